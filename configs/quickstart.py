"""A small policy learns FrozenLake by ActFocus, on two CPU cores.

bash launch/quickstart.sh
python -m actfocus_jax.train --config=configs/quickstart.py \
  --workdir=runs/quickstart

Hardware and time: 2 CPU cores, 8 minutes, 2.5 of them for the warm start.
Expected: held-out success from 37-40 % to 81-84 % at the last step (seeds 0, 1,
2; 32 boards x 16 episodes at temperature 0.5; intervals in README.md). Ten
random actions solve 28 % of these boards.
"""

from actfocus_jax.config import presets, schema


def get_config(arg=None):
  """Arguments: algo=ppo|grpo, weights=actfocus|uniform|..., estimator=."""
  c = schema.defaults('frozen_lake')
  c.env.options.success_probability = 1.0
  # The demonstrations describe the board well and act by habit. So the actions
  # are what reinforcement learning improves, and ActFocus weights.
  c.player.options.skill = 0.3
  c.player.options.habit = 0.4
  c.num_steps = 80
  c.selection.ratio = 0.5
  c.learner.minibatch = 64
  c.learner.microbatch = 32
  presets.apply(c, presets.arguments(arg))
  c.lock()
  return c
