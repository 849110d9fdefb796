"""The config of a run that takes seconds, for the tests of whole runs."""

import pathlib

import jax

from actfocus_jax import build
from actfocus_jax.config import presets, schema, validate
from actfocus_jax.warmstart import model as warm_model

# Fields of the quick start for a training command whose steps take no time; for
# tests that look at how a run begins and ends, not at its numbers.
INSTANT = {
  'env.options.success_probability': 1.0,
  'limits.turns': 2,
  'limits.context': 224,
  'limits.response_tokens': 24,
  'rollout.prompts': 2,
  'rollout.members': 2,
  'rollout.lengths': '()',
  'selection.ratio': 1.0,
  'selection.patience': 1000,
  'learner.minibatch': 4,
  'learner.microbatch': 0,
  'learner.self_check': False,
  'eval.every': 0,
  'eval.prompts': 2,
  'eval.members': 2,
  'eval.save': 0,
  'warm_start.batch': 8,
  'warm_start.hidden_size': 32,
}


def config(
  cache: pathlib.Path,
  env='frozen_lake',
  algo='grpo',
  weights='actfocus',
  **changes,
):
  """Two steps of 8 x 2 episodes of two turns; no self-check, no viewer.

  Args:
    cache: Of warm starts.
    env: As of schema.defaults.
    algo: A config argument.
    weights: A config argument.
    **changes: Fields by their dotted names, with `__` for a dot.

  Returns:
    The config, checked and locked.
  """
  c = schema.defaults(env)
  presets.apply(c, presets.arguments(f'algo={algo},weights={weights}'))
  if env == 'frozen_lake':
    c.env.options.success_probability = 1.0
    c.limits.turns = 2
  c.num_steps = 2
  c.limits.update(context=224, response_tokens=24)
  c.rollout.update(prompts=8, members=2, lengths=(), cache_block=224)
  c.learner.update(minibatch=16, microbatch=8, self_check=False)
  c.eval.update(every=0, prompts=8, members=2, save=0)
  c.warm_start.update(
    cache=str(cache),
    episodes=128,
    steps=120,
    batch=16,
    hidden_size=64,
    intermediate_size=128,
  )
  for field, value in changes.items():
    *sections, name = field.split('__')
    parent = c
    for section in sections:
      parent = parent[section]
    parent[name] = value
  validate.check(c)
  return c.lock()


def make_warm_start(c):
  """Makes what a config starts from: it computes more than it compiles."""
  plan = build.warm_start(c)
  jax.config.update('jax_disable_most_optimizations', False)
  with jax.numpy_dtype_promotion('standard'), plan.pool:
    warm_model.ensure(plan)
  jax.config.update('jax_disable_most_optimizations', True)
