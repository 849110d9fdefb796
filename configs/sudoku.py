"""Sudoku 4x4, six empty cells, with the paper's settings.

python -m actfocus_jax.train --config=configs/sudoku.py:size=0.5b \
  --workdir=runs/sudoku

Hardware and time: meant for accelerators at the sizes 0.5b to 7b; size=tiny
runs on two CPU cores.
Expected: not measured yet at sizes other than tiny; see README.md.
"""

from actfocus_jax.run import presets, settings


def get_config(arg=None):
  """Arguments: size=tiny|0.5b|1.5b|3b|7b, algo=, weights=, estimator=."""
  c = settings.defaults('sudoku')
  c.selection.ratio = 0.25
  choice = presets.arguments(arg)
  presets.apply(c, choice)
  if choice['size'] == 'tiny':
    c.limits.context = 1536
    c.rollout.lengths = (1024, 1536)
  c.lock()
  return c
