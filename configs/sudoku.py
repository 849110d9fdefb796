"""Sudoku 4x4, six empty cells, with the paper's settings.

python -m actfocus_jax.train --config=configs/sudoku.py:size=0.5b \
  --workdir=runs/sudoku

Hardware and time: an accelerator for the sizes 0.5b to 7b. size=tiny has four
empty cells and six turns. It takes 20 minutes of CPU time, almost half of them
for the warm start.
Expected: with size=tiny held-out success from 33 % to 69 % in 60 steps (seed 0;
README.md). Other sizes are not measured. Random numbers in the cells with the
fewest valid ones solve 25 % of the boards of size=tiny.
"""

from actfocus_jax.config import presets, schema


def get_config(arg=None):
  """Arguments: size=tiny|0.5b|1.5b|3b|7b, algo=, weights=, estimator=."""
  choice = presets.arguments(arg)
  c = schema.defaults('sudoku')
  c.selection.ratio = 0.25
  presets.apply(c, choice)
  if choice['size'] == 'tiny':
    c.env.options.blanks = 4
    c.limits.update(turns=6, action_budget=12, context=1024)
    c.player.name = 'orderly'
    c.warm_start.update(steps=450, batch=16, observation_weight=1.0)
    c.num_steps = 60
    c.eval.every = 20
    c.rollout.update(members=8, lengths=(768, 1024))
    c.selection.ratio = 0.5
    c.learner.update(minibatch=32, microbatch=16)
  c.lock()
  return c
