"""Sokoban 6x6 with one box, with the paper's settings.

python -m actfocus_jax.train --config=configs/sokoban.py:size=0.5b \
  --workdir=runs/sokoban
"""

from actfocus_jax.run import presets, settings


def get_config(arg=None):
  """Arguments: size=tiny|0.5b|1.5b|3b|7b, algo=grpo, weights=actfocus|..."""
  c = settings.defaults('sokoban')
  c.selection.ratio = 0.25
  presets.apply(c, presets.arguments(arg))
  c.lock()
  return c
