"""Resume rules: fields that may change when a run is continued.

Effect of a change on the run, on CPU in float32, as tested:

- Nothing changed: bit for bit the run that was never stopped.
- `rollout.slots`, `decode_steps`, `cache_block`, `observation_block` and
  `lengths`: the same boards. A token is drawn by the row of its episode and its
  position, so tokens are the same up to ties that rounding decides.
- `learner.microbatch`, `score_chunk`, `fused`, `model.remat`, `mesh`: the same
  sums in another order, so the same step up to rounding.
- `rollout.prompts`, `rollout.members`, `learner.minibatch`: other episodes or
  optimizer steps, so another run. Boards continue without a gap or a repeat.
  Counts of optimizer steps (`optimizer.warmup_steps`, Adam) continue as counts.

Rounding errors grow: after some steps two such runs sample other episodes.
"""

import pathlib
from typing import Any

from actfocus_jax.config import schema

# Files of a run directory; a run has begun when both exist.
CONFIG, MODEL = 'config.json', 'model.json'

# Fields, or sections, that may change when a run is continued: length and
# frequency; the machine and the split of the work on it, which decide speed and
# rounding; the place of the model, whose fingerprint is checked.
_CONTINUABLE = (
  *('num_steps', 'eval.every', 'eval.save', 'checkpoint.', 'mesh.'),
  *('env.threads', 'env.time_limit', 'model.path', 'model.revision'),
  *('model.remat', 'model.attention', 'rollout.slots', 'rollout.decode_steps'),
  *('rollout.lengths', 'rollout.observation_block', 'rollout.cache_block'),
  *('learner.microbatch', 'learner.score_chunk', 'learner.self_check'),
  'learner.fused',
)
# The batch may change too: it follows the machine, but it changes what is
# learned.
_BATCH = ('rollout.prompts', 'rollout.members', 'learner.minibatch')


def model_file(workdir: pathlib.Path) -> pathlib.Path | None:
  """Return the file that names the initial model; None before a run begins."""
  files = (workdir / MODEL, workdir / CONFIG)
  return files[0] if all(file.exists() for file in files) else None


def difference(
  old: dict[str, Any], new: dict[str, Any], *, same_batch: bool = False
) -> str | None:
  """Return the first change that makes `new` another experiment than `old`.

  Both are configs by `to_json`. With `same_batch`, as in comparisons of runs,
  another batch size is another experiment. Returns a phrase with the field and
  both values, or None if a run of `old` can be continued with `new`.
  """
  free = _CONTINUABLE if same_batch else _CONTINUABLE + _BATCH
  for field, (was, now) in changed(old, new).items():
    if not field.startswith(free):
      return f'{field} was {was!r} and is now {now!r}'
  return None


def changed(
  old: dict[str, Any], new: dict[str, Any], *, commit: str = ''
) -> dict[str, list[Any]]:
  """Return the fields that differ as {field: [old value, new value]}.

  A field that `old`, of an earlier version, does not have counts as its
  default. `commit` is the commit of the model's files on the hub, or ''. An
  empty `model.revision` in `old` equals this commit in `new`.
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
