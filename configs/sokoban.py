"""Sokoban 6x6 with one box, with the paper's settings.

python -m actfocus_jax.train --config=configs/sokoban.py:size=0.5b \
  --workdir=runs/sokoban

Hardware and time: an accelerator for the sizes 0.5b to 7b. size=tiny takes 25
minutes of CPU time, a third of them for the warm start.
Expected: with size=tiny held-out success from 22 % to 39 % in 80 steps, 46 % at
step 60 (seed 0; README.md). Other sizes are not measured. Ten random actions
solve 19.3 % of the held-out boards.
"""

from actfocus_jax.config import presets, schema


def get_config(arg=None):
  """Arguments: size=tiny|0.5b|1.5b|3b|7b, algo=, weights=, estimator=."""
  choice = presets.arguments(arg)
  c = schema.defaults('sokoban')
  c.selection.ratio = 0.25
  presets.apply(c, choice)
  if choice['size'] == 'tiny':
    # As in configs/quickstart.py: the player plans better than it acts.
    c.player.options.skill = 0.3
    c.player.options.habit = 0.4
    c.warm_start.update(steps=400, observation_weight=1.0)
    c.num_steps = 80
    c.eval.every = 20
    c.selection.ratio = 0.5
    c.learner.update(minibatch=64, microbatch=32)
  c.lock()
  return c
