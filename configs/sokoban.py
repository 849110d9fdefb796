"""Sokoban 6x6 with one box, with the paper's settings.

python -m actfocus_jax.train --config=configs/sokoban.py:size=0.5b \
  --workdir=runs/sokoban

Hardware and time: meant for accelerators at the sizes 0.5b to 7b; size=tiny
runs on two CPU cores at about the pace of configs/quickstart.py.
Expected: not measured yet at any size. Chance: ten random actions solve
18 % of the boards.
"""

from actfocus_jax.run import presets, settings


def get_config(arg=None):
  """Arguments: size=tiny|0.5b|1.5b|3b|7b, algo=, weights=, estimator=."""
  c = settings.defaults('sokoban')
  c.selection.ratio = 0.25
  presets.apply(c, presets.arguments(arg))
  c.lock()
  return c
