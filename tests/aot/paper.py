"""What the paper's largest runs are, for the tests of this room."""

from actfocus_jax.aot import workload
from actfocus_jax.config import presets, schema
from actfocus_jax.model import architecture

QWEN = architecture.Config(**presets.SHAPES[presets.MODELS['3b']])
WORK = workload.Workload(512, 128, 400, 5, context=3600, steps=8)


def config(algo='ppo', **changes):
  """Sokoban with the 3B model; keywords are fields of `rollout`."""
  c = schema.defaults('sokoban')
  choice_of = dict(size='3b', algo=algo, weights='actfocus', estimator='auto')
  c.selection.ratio = 0.25
  presets.apply(c, choice_of)
  c.rollout.update(changes)
  return c
