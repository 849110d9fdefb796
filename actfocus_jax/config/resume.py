"""Whether a run may go on with another config, and what changed.

What another batch, mesh or block size keeps, on CPU in float32 and as tested:

- The same config on the same mesh: bit for bit the run that was never stopped.
- `rollout.slots`, `decode_steps`, `cache_block`, `observation_block` and
  `lengths`: the same boards, and an id is drawn by its episode's row and its
  place, so the same ids up to ties that rounding decides, and the same step up
  to rounding.
- `learner.microbatch`, `score_chunk`, `fused`, `model.remat`, `mesh`: the same
  sums in another order, so the same step up to rounding.
- `rollout.prompts`, `rollout.members`, `learner.minibatch`: other episodes or
  other optimizer steps, so another run from there on. Boards go on where they
  were: none repeats, none is left out. Counts in optimizer steps, which are
  `optimizer.warmup_steps` and Adam's own, go on as counts.

Rounding grows: after some steps two such runs sample different episodes.
"""

import pathlib
from typing import Any

from actfocus_jax.config import schema

# Of a run directory; a run has begun when both are there.
CONFIG, MODEL = 'config.json', 'model.json'

# What may change when a run is continued in its workdir. How far and how often;
# the machine and the split of the work on it, which decide the speed and the
# rounding; and where the model lies, for the run knows its fingerprint.
_CONTINUABLE = (
  *('num_steps', 'eval.every', 'eval.save', 'checkpoint.', 'mesh.'),
  *('env.threads', 'env.time_limit', 'model.path', 'model.revision'),
  *(
    'model.remat',
    'model.attention',
    'rollout.slots',
    'rollout.decode_steps',
    'rollout.lengths',
  ),
  *('rollout.observation_block', 'rollout.cache_block', 'learner.fused'),
  *('learner.microbatch', 'learner.score_chunk', 'learner.self_check'),
)
# The batch: how many episodes a step learns from, and an optimizer step. It
# follows the machine too, but what is learned depends on it.
_BATCH = ('rollout.prompts', 'rollout.members', 'learner.minibatch')


def model_file(workdir: pathlib.Path) -> pathlib.Path | None:
  """What a run started from, written down; None where none has begun."""
  files = (workdir / MODEL, workdir / CONFIG)
  return files[0] if all(file.exists() for file in files) else None


def difference(
  old: dict[str, Any], new: dict[str, Any], *, same_batch: bool = False
) -> str | None:
  """The first field that makes `new` another experiment than `old`.

  Args:
    old: `to_json` of the run's config.
    new: `to_json` of the config now.
    same_batch: Whether another batch size is another experiment: where runs
      are compared.

  Returns:
    `field: old value, new value` as a phrase, or None when a run of `old` can
    go on with `new`.
  """
  free = _CONTINUABLE if same_batch else _CONTINUABLE + _BATCH
  for field, (was, now) in changed(old, new).items():
    if not field.startswith(free):
      return f'{field} was {was!r} and is now {now!r}'
  return None


def changed(
  old: dict[str, Any], new: dict[str, Any], *, commit: str = ''
) -> dict[str, list[Any]]:
  """The fields that differ: their value in `old` and in `new`.

  Args:
    old: `to_json` of the run's config. A field that an earlier version did not
      have counts as its default, as of `schema.from_json`.
    new: `to_json` of the config now.
    commit: Of the hub, that the model's files are of. A `model.revision` that
      was left open and now names it says the same.

  Returns:
    Field -> [old value, new value].
  """
  default = schema.schema_of(schema.from_json(new))
  old = schema.to_json(default) | old
  if commit and (old['model.revision'], new['model.revision']) == ('', commit):
    old['model.revision'] = commit
  return {
    field: [old.get(field, 'absent'), new.get(field, 'absent')]
    for field in sorted(old.keys() | new.keys())
    if old.get(field) != new.get(field)
  }
