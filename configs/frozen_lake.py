"""FrozenLake 4x4, slippery, with the paper's settings.

python -m actfocus_jax.train --config=configs/frozen_lake.py:size=0.5b \
  --workdir=runs/frozen_lake

Hardware and time: an accelerator for the sizes 0.5b to 7b. size=tiny takes
about as long as configs/quickstart.py on two CPU cores.
Expected: not measured at any size. Ten random actions solve 24 % of the boards.
"""

from actfocus_jax.config import presets, schema


def get_config(arg=None):
  """Arguments: size=tiny|0.5b|1.5b|3b|7b, algo=, weights=, estimator=."""
  c = schema.defaults('frozen_lake')
  c.env.options.success_probability = 0.8
  c.selection.ratio = 1.0
  choice = presets.arguments(arg)
  if choice['algo'] == 'ppo':
    c.selection.ratio = 0.25
  presets.apply(c, choice)
  c.lock()
  return c
