"""The run directory: the one thing that a run leaves behind.

config.json  model.json  metrics.jsonl  eval.jsonl  baselines.json
config_changes.jsonl  checkpoints/  rollouts/  report/

A run that is killed leaves whole files: rows are appended line by line,
everything else is written beside its place and renamed. `storage` and `metrics`
say what is different in a bucket.

config.json is the newest config; what it changed of an earlier one is a row of
config_changes.jsonl: {"step": 20, "changed": {"rollout.prompts": [8, 16]}}.
"""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import IO, Any

from actfocus_jax import errors
from actfocus_jax.config import resume, schema
from actfocus_jax.run import checkpoint, metrics, storage

_CHANGES = 'config_changes.jsonl'


def _own(seen: Any) -> Any:
  """One process agrees with itself."""
  return seen


class RunDirectory:
  """Opens or makes a run directory, for one run at a time.

  A context manager: leaving it waits for the last checkpoint. Of a run on
  several processes one writes the files. All of them make the same calls, for
  each saves its own part of a checkpoint, and all must see the same directory.

  In a bucket another process may take a directory whose holder was not heard
  of for a while. Whatever writes there, rows included, raises RunError from
  then on: the files are the other's.

  Attributes:
    metrics: Rows of metrics.jsonl, one per training step.
    evaluations: Rows of eval.jsonl.
    changes: A sentence for each field that the run goes on with another value
      of.
  """

  def __init__(
    self,
    path: pathlib.Path,
    config: dict[str, Any],
    model: dict[str, str],
    *,
    writes: bool = True,
    on_failure: Callable[[BaseException], None] | None = None,
  ):
    """Makes the directory and locks it; says nothing to other processes.

    Args:
      path: run directory, checked by `paths.check_workdir`.
      config: values by dotted field name, as of `schema.to_json`.
      model: What the run starts from: its `path` and `commit`, for people, and
        its `sha256`.
      writes: False in every process but the first: all but checkpoints is read
        and never written then, and nothing is locked.
      on_failure: As of `checkpoint.Checkpoints`.

    Raises:
      UsageError: When another process is training there, or the run there
        started from another model; nothing has been written then.
    """
    self._path, self._writes, self._config = path, writes, config
    self._model, self.changes = model, []
    self._lock = None
    if writes:
      path.mkdir(parents=True, exist_ok=True)
      lease = storage.is_remote(path)
      self._lock = (storage.Lease if lease else lock)(path / '.lock')
    self.metrics, self.evaluations = (
      metrics.MetricsFile(path / name, writes=writes, check=self._check)
      for name in ('metrics.jsonl', 'eval.jsonl')
    )
    self._checkpoints = checkpoint.Checkpoints(
      path / 'checkpoints',
      keep=config['checkpoint.keep'],
      on_failure=on_failure,
    )
    try:
      if resume.model_file(path):
        check_model(path, model)
    except BaseException:  # Nobody would leave the context that is not entered.
      self.let_go()
      raise

  def __enter__(self) -> 'RunDirectory':
    """Writes the config and what the run starts from; returns itself."""
    try:
      # Processes meet where the checkpoints are opened, so all do it here.
      latest = self._checkpoints.latest_step()
      self.changes = self._note_changes(latest)
      self.write(resume.MODEL, self._model)
      self.write(resume.CONFIG, self._config)
    except BaseException:
      self.let_go()
      raise
    return self

  def __exit__(self, *exception):
    """Waits for the last checkpoint and lets others in."""
    with contextlib.ExitStack() as last:  # Others get in whatever fails.
      last.callback(self.let_go)
      last.callback(self.evaluations.close)
      last.callback(self.metrics.close)
      last.callback(self._checkpoints.close)
      self._checkpoints.wait()

  def restore(
    self, wanted, *, agreed: Callable[[Any], Any] = _own
  ) -> tuple[Any, int]:
    """Reads the newest checkpoint.

    What was written after it is dropped: those steps will be done again.

    Args:
      wanted: Shapes, dtypes and shardings of the state.
      agreed: Makes the newest step that this process sees the one that all
        processes of the run read.

    Returns:
      The state to go on from, or None when there is no checkpoint; and the
      seed of the first board that no step up to there has seen.
    """
    latest = agreed(self._checkpoints.latest_step())
    state, next_seed = None, schema.FIRST_TRAINING_SEED
    if latest is not None:
      state, extra = self._checkpoints.restore(latest, wanted)
      next_seed = extra.get('next_seed', self._seed_by_counting(latest))
    self._drop(0 if latest is None else latest + 1)
    return state, next_seed

  def write(self, name: str, content: Any):
    """Writes a JSON file, whole or not at all."""
    if self._writes:
      self._check()
      storage.write(self._path / name, json.dumps(content, indent=2) + '\n')

  def write_episodes(self, step: int, records: Iterable[dict[str, Any]]):
    """Writes the episodes of one evaluation for the viewer."""
    if not self._writes:
      return
    self._check()
    folder = self._path / 'rollouts'
    folder.mkdir(exist_ok=True)
    lines = (json.dumps(record) + '\n' for record in records)
    storage.write(folder / f'step_{step:06d}.jsonl', ''.join(lines))

  def save(self, step: int, state, success: float | None, next_seed: int):
    """Starts to write a checkpoint; see `Checkpoints.save`.

    Args:
      step: Finished iterations.
      state: Of them.
      success: Held-out success, if it was measured.
      next_seed: Of the first board that no step has seen.
    """
    self._check()
    extra = {'step': step, 'next_seed': next_seed}
    self._checkpoints.save(step, state, extra, success=success)

  def _drop(self, step: int):
    """Drops rows and episodes of a step and later ones."""
    self.metrics.truncate(step)
    self.evaluations.truncate(step)
    if not self._writes:
      return
    self._check()
    for file in (self._path / 'rollouts').glob('step_*.jsonl'):
      if int(file.stem.removeprefix('step_')) >= step:
        file.unlink()

  def _note_changes(self, latest: int | None) -> list[str]:
    """Notes what differs from the config before; it is still in its place."""
    file = self._path / resume.CONFIG
    if not self._writes or not file.exists():
      return []
    changed = resume.changed(
      json.loads(file.read_text()),
      self._config,
      commit=self._model.get('commit', ''),
    )
    if changed and latest is not None:
      rows = metrics.read(self._path / _CHANGES)
      row = {'step': latest, 'changed': changed}
      # It is there where a kill left the row but not the new config.json.
      if rows[-1:] != [row]:
        lines = (json.dumps(each) + '\n' for each in [*rows, row])
        self._check()
        storage.write(self._path / _CHANGES, ''.join(lines))
    return [
      f'{field} was {was!r} and is now {now!r}'
      for field, (was, now) in changed.items()
      if latest is not None
    ]

  def _seed_by_counting(self, step: int) -> int:
    """The next seed where a checkpoint of an earlier version has none.

    Every step up to there had as many prompts as the first config: since
    prompts may change there is a seed in every checkpoint.
    """
    prompts = self._config['rollout.prompts']
    for row in reversed(metrics.read(self._path / _CHANGES)):
      prompts = row['changed'].get('rollout.prompts', [prompts])[0]
    return schema.FIRST_TRAINING_SEED + step * prompts

  def _check(self):
    """Raises RunError when another process has taken the directory."""
    if isinstance(self._lock, storage.Lease):
      self._lock.check()

  def let_go(self):
    """Gives the lock back, and nothing else; for a run that was not entered."""
    if self._lock is not None:
      self._lock.close()


def lock(path: pathlib.Path, *, wait: bool = False) -> IO[str]:
  """Takes a file lock, which ends with the process or with `close`.

  Args:
    path: The lock file; made if need be.
    wait: Whether to wait for whoever holds it.

  Returns:
    The open file.

  Raises:
    UsageError: When somebody holds it and `wait` is False.
  """
  file = path.open('w')
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError as error:
    file.close()
    raise storage.taken(path) from error
  return file


def check_model(path: pathlib.Path, model: dict[str, str]):
  """Refuses a model that is not the one a run started from.

  Args:
    path: The run directory.
    model: As of `RunDirectory`.

  Raises:
    UsageError: One sentence.
  """
  noted = json.loads((path / resume.MODEL).read_text())
  if model['sha256'] != noted['sha256']:
    commit = noted.get('commit')
    where = f' (--config.model.revision={commit})' if commit else ''
    raise errors.UsageError(
      f'The files in {model["path"]} are not those that the run in {path} '
      f'started from, and are its frozen reference; put them back{where}, or '
      'use a new workdir.'
    )


def check_checkpoints(path: pathlib.Path, step: int | None):
  """Refuses a run directory without checkpoints, with no word to others.

  Args:
    path: The run directory.
    step: What is wanted, as of `restore_part`.

  Raises:
    UsageError: One sentence.
  """
  if not (path / 'checkpoints').is_dir():
    raise _missing(path, step, [])


def _missing(
  path: pathlib.Path, step: int | None, steps: list[int]
) -> errors.UsageError:
  there = ', '.join(map(str, steps)) or 'none'
  return errors.UsageError(
    f'--step is {step}, but the checkpoints in {path} are: {there}.'
  )


def restore_part(
  path: pathlib.Path,
  part,
  step: int | None,
  *,
  agreed: Callable[[Any], Any] = _own,
):
  """Reads part of a checkpoint, such as the parameters alone.

  Args:
    path: A run directory.
    part: Shapes, dtypes and shardings in the structure of the train state;
      None for what is not wanted.
    step: Of the checkpoint; None is the newest.
    agreed: As of `RunDirectory.restore`, of all steps.

  Returns:
    The step and the part.

  Raises:
    UsageError: When there is no such checkpoint.
  """
  checkpoints = checkpoint.Checkpoints(path / 'checkpoints', read_only=True)
  steps = agreed(checkpoints.all_steps())
  wanted = step if step is not None else max(steps, default=None)
  if wanted not in steps:
    checkpoints.close()
    raise _missing(path, step, steps)
  part, _ = checkpoints.restore(wanted, part)
  checkpoints.close()
  return wanted, part
