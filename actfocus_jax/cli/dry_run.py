"""What a run would do and need, told without doing it.

`--dry_run` of `actfocus_jax.train` prints this and stops; neither weights nor
jax are read.
"""

import pathlib

import ml_collections

from actfocus_jax import sizes
from actfocus_jax.cli import memory
from actfocus_jax.config import schema, validate
from actfocus_jax.model import architecture

_ITEMSIZE = {'float32': 4, 'bfloat16': 2, 'auto': 2}


def describe(
  c: ml_collections.ConfigDict, directory: pathlib.Path | None
) -> str:
  """The effective config, the work of one step, and the memory it takes.

  Args:
    c: A checked config.
    directory: Of the model; None for the small model of `warm_start` and for
      those whose shape is known (`presets.SHAPES`).

  Returns:
    Several lines for people.

  Raises:
    UsageError: When the mesh cannot share the batches or the model.
  """
  sizes.check_splits(c, directory)
  lines = ['Config:']
  default = schema.flatten(schema.schema_of(c))
  for field, value in sorted(schema.flatten(c).items()):
    mark = ' ' if value == default[field] else '*'
    lines.append(f' {mark} {field} = {value!r}')
  lines.append('(* differs from the default)')
  lines.append('')
  lines.append('One step:')
  lines += [f'  {name}: {value}' for name, value in work(c).items()]
  lines.append('')
  lines.append('Memory of one device by formula, GB:')
  for part, size in needs(c, sizes.shape(c, directory)).items():
    lines.append(f'  {part:<14} {size / 1e9:8.2f}')
  if c.model.dtype == 'auto':
    lines.append(
      '  (model.dtype=auto counted as 2 bytes; on a CPU it is float32, 4 bytes)'
    )
  is_open = [f'mesh.{name}' for name, size in c.mesh.items() if size < 1]
  if is_open:
    lines.append(f'  ({" and ".join(is_open)}, -1, counted as 1)')
  return '\n'.join(lines)


def work(c: ml_collections.ConfigDict) -> dict[str, str]:
  """Episodes, tokens and optimizer updates of one step."""
  episodes = c.rollout.prompts * c.rollout.members
  sampled = schema.most_turns(c) * c.limits.response_tokens
  return {
    'episodes': f'{episodes} ({c.rollout.prompts} groups of '
    f'{c.rollout.members})',
    'tokens sampled': f'at most {episodes * sampled:,}',
    'tokens in context': f'at most {episodes * c.limits.context:,}',
    'trajectories trained on': f'{validate.kept_rows(c)}',
    'optimizer updates': f'{_updates(c)} of {c.learner.minibatch} trajectories',
    'frozen reference': 'read' if schema.has_reference(c) else 'not read',
    'critic': 'trained' if c.algo == 'ppo' else 'none',
  }


def needs(
  c: ml_collections.ConfigDict, config: architecture.Config
) -> dict[str, float]:
  """`memory.per_device` with the numbers of a config."""
  m = {name: max(size, 1) for name, size in c.mesh.items()}
  episodes = max(
    c.rollout.prompts * c.rollout.members, c.eval.prompts * c.eval.members
  )
  return memory.per_device(
    config,
    algo=c.algo,
    slots=min(c.rollout.slots or episodes, episodes),
    context=c.limits.context,
    microbatch=c.learner.microbatch or c.learner.minibatch,
    score_chunk=c.learner.score_chunk,
    has_reference=schema.has_reference(c),
    data=m['data'] * m['dcn_data'],
    fsdp=m['fsdp'] * m['dcn_fsdp'],
    tensor=m['tensor'],
    itemsize=_ITEMSIZE[c.model.dtype],
    updates=_updates(c),
  )


def _updates(c: ml_collections.ConfigDict) -> int:
  """Optimizer updates of one step."""
  return validate.kept_rows(c) // c.learner.minibatch * c.learner.epochs
