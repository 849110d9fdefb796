"""Boards: training, evaluation and demonstrations never meet.

That those of training never repeat is in test_resume_batch.py.
"""

from actfocus_jax import build
from actfocus_jax.config import schema

MANY = 100_000  # steps; the paper takes 200


def test_demonstrations_have_boards_of_their_own():
  c = schema.defaults()
  used = []
  for c.warm_start.seed in (0, 1):
    plan = build.warm_start(c)
    assert len(plan.seeds) == c.warm_start.episodes
    used += [plan.seeds, plan.tokenizer_seeds]
  latest = schema.FIRST_TRAINING_SEED + MANY * 8
  assert min(seeds.start for seeds in used) > latest
  assert len(set().union(*used)) == sum(map(len, used))
