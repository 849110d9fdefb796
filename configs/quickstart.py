"""A small policy learns FrozenLake by ActFocus, on two CPU cores.

bash launch/quickstart.sh
python -m actfocus_jax.train --config=configs/quickstart.py \
    --workdir=runs/quickstart
"""

from actfocus_jax.run import settings


def get_config(arg=None):
  """Arguments: weights=actfocus|uniform|downweight|..."""
  choice = settings.parse_argument(
    arg,
    weights=('actfocus', *(n for n in settings.WEIGHTS if n != 'actfocus')),
    algo=settings.ALGOS,
    size=('tiny',),
  )
  c = settings.defaults()
  c.num_steps = 60
  c.env.name = 'frozen_lake'
  c.env.options.success_probability = 1.0
  c.warm_start.player_options.skill = 0.15

  c.limits.response_tokens = 32
  c.limits.context = 512
  c.rollout.decode_steps = 6
  c.rollout.lengths = (384, 512)

  c.algo = choice['algo']
  c.weights = settings.WEIGHTS[choice['weights']]
  c.selection.ratio = 1.0
  c.optimizer.learning_rate = 3e-4
  c.learner.minibatch = 64
  c.learner.microbatch = 16
  c.lock()
  return c
