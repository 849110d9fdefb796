"""Run directory: the files that a run reads and leaves.

config.json  model.json  metrics.jsonl  eval.jsonl  baselines.json
config_changes.jsonl  checkpoints/  rollouts/  report/

README.md of this package describes them. A killed run leaves whole files: rows
are appended line by line; all else is written beside its place and renamed.
In a bucket this differs: see `storage` and `metrics`.

A run of several processes has one directory that all of them see. Process 0
writes the files; each process saves its own part of a checkpoint.
"""

import contextlib
import json
import pathlib
import time
import uuid
from collections.abc import Iterable
from typing import Any

from actfocus_jax import errors
from actfocus_jax.config import resume, schema
from actfocus_jax.parallel import processes
from actfocus_jax.run import checkpoint, locks, metrics, storage

_CHANGES = 'config_changes.jsonl'
# Seconds within which a shared directory must show what another process wrote.
_SEEN_WITHIN = 40.0


def open_run(
  workdir: pathlib.Path, config: dict[str, Any], model: dict[str, str]
) -> 'RunDirectory':
  """Open the run directory in every process of a run; a collective.

  The arguments are those of RunDirectory, the same in all processes.

  Raises:
    UsageError: RunDirectory refuses the directory, or not all processes see it.
      It is raised in all processes.
  """
  if processes.count() > 1:
    check_shared(workdir)
  opened = None
  try:
    with processes.raise_everywhere():
      opened = RunDirectory(workdir, config, model)
  except errors.UsageError:
    if opened is not None:  # Another process was refused.
      opened.release()
    raise
  return opened


class RunDirectory:
  """Run directory that is open for one run at a time.

  A context manager: leaving it waits for the last checkpoint. All processes of
  a run make the same calls. Only process 0 writes the files and holds the lock.

  In a bucket another process may take a directory whose lease was not renewed
  in time. From then on every write here raises RunError.

  Attributes:
    metrics: rows of metrics.jsonl, one per training step.
    evaluations: rows of eval.jsonl.
    changes: one sentence per config field that has another value than before.
  """

  def __init__(
    self, path: pathlib.Path, config: dict[str, Any], model: dict[str, str]
  ):
    """Make the directory and lock it, without a collective.

    Args:
      path: run directory, checked by `paths.check_workdir`.
      config: values by dotted field name, by `schema.to_json`.
      model: the model that the run starts from: its `sha256`, and for people
        its `path` and `commit`.

    Raises:
      UsageError: another process is training there, or the run there started
        from another model; nothing has been written then.
    """
    self._path, self._writes = path, processes.is_first()
    self._config, self._model, self.changes = config, model, []
    self._lock = None
    if self._writes:
      path.mkdir(parents=True, exist_ok=True)
      take = locks.Lease if storage.is_remote(path) else locks.lock_file
      self._lock = take(path / '.lock')
    self.metrics, self.evaluations = (
      metrics.MetricsFile(path / name, writes=self._writes, check=self._check)
      for name in ('metrics.jsonl', 'eval.jsonl')
    )
    self._checkpoints = checkpoint.Checkpoints(
      path / 'checkpoints',
      keep=config['checkpoint.keep'],
      on_failure=processes.abort,
    )
    try:
      if resume.model_file(path):
        check_model(path, model)
    except BaseException:  # The context is not entered, so never left.
      self.release()
      raise

  def __enter__(self) -> 'RunDirectory':
    """Write the config and the model that the run starts from."""
    try:
      # Opening the checkpoints is a collective, so all processes do it here.
      latest = self._checkpoints.latest_step()
      self.changes = self._write_changes(latest)
      self.write(resume.MODEL, self._model)
      self.write(resume.CONFIG, self._config)
    except BaseException:
      self.release()
      raise
    return self

  def __exit__(self, *exception):
    """Wait for the last checkpoint and release the lock, whatever fails."""
    with contextlib.ExitStack() as last:
      last.callback(self.release)
      last.callback(self.evaluations.close)
      last.callback(self.metrics.close)
      last.callback(self._checkpoints.close)
      self._checkpoints.wait()

  def release(self):
    """Release the lock, and nothing else: for a run that was not entered."""
    if self._lock is not None:
      self._lock.close()

  def restore(self, abstract_state) -> tuple[Any, int]:
    """Read the newest checkpoint and drop the rows written after it.

    Those steps are done again. A collective: all processes read the checkpoint
    that is the newest in process 0.

    Returns:
      The state, None without a checkpoint; and the seed of the first board that
      no step up to there has used.
    """
    latest = processes.broadcast(self._checkpoints.latest_step())
    state, next_seed = None, schema.FIRST_TRAINING_SEED
    if latest is not None:
      state, extra = self._checkpoints.restore(latest, abstract_state)
      next_seed = extra['next_seed']
    step = 0 if latest is None else latest + 1
    self.metrics.truncate(step)
    self.evaluations.truncate(step)
    if self._writes:
      self._check()
      for file in (self._path / 'rollouts').glob('step_*.jsonl'):
        if int(file.stem.removeprefix('step_')) >= step:
          file.unlink()
    return state, next_seed

  def write(self, name: str, content: Any):
    """Write a JSON file, whole or not at all."""
    if self._writes:
      self._check()
      storage.write(self._path / name, json.dumps(content, indent=2) + '\n')

  def write_episodes(self, step: int, episodes: Iterable[dict[str, Any]]):
    """Write the episodes of one evaluation for the viewer."""
    if not self._writes:
      return
    self._check()
    folder = self._path / 'rollouts'
    folder.mkdir(exist_ok=True)
    lines = (json.dumps(episode) + '\n' for episode in episodes)
    storage.write(folder / f'step_{step:06d}.jsonl', ''.join(lines))

  def save(self, step: int, state, success: float | None, next_seed: int):
    """Start to write a checkpoint; see `Checkpoints.save`.

    `next_seed` is the seed of the first board that no step has used.
    """
    self._check()
    extra = {'step': step, 'next_seed': next_seed}
    self._checkpoints.save(step, state, extra, success=success)

  def _write_changes(self, latest: int | None) -> list[str]:
    """Compare with the earlier config, which is still in its place."""
    file = self._path / resume.CONFIG
    if not self._writes or latest is None or not file.exists():
      return []
    changed = resume.changed(
      json.loads(file.read_text()),
      self._config,
      commit=self._model.get('commit', ''),
    )
    rows = metrics.read(self._path / _CHANGES)
    row = {'step': latest, 'changed': changed}
    # A kill may have left the row but not the new config.json.
    if changed and rows[-1:] != [row]:
      lines = (json.dumps(each) + '\n' for each in [*rows, row])
      self._check()
      storage.write(self._path / _CHANGES, ''.join(lines))
    return [
      f'{field} was {old!r} and is now {new!r}'
      for field, (old, new) in changed.items()
    ]

  def _check(self):
    """Raise RunError if another process has taken the directory."""
    if isinstance(self._lock, locks.Lease):
      self._lock.check()


def restore_part(
  path: pathlib.Path, abstract_part, step: int | None
) -> tuple[int, Any]:
  """Read part of a checkpoint, such as the parameters; a collective.

  Args:
    path: run directory.
    abstract_part: train state of abstract arrays; None for unwanted parts.
    step: step of the checkpoint; None is the newest.

  Returns:
    The step and the part.

  Raises:
    UsageError: not all processes see such a checkpoint.
  """
  checkpoints = checkpoint.Checkpoints(path / 'checkpoints', read_only=True)
  steps = processes.common(checkpoints.all_steps())
  wanted = step if step is not None else max(steps, default=None)
  if wanted not in steps:
    checkpoints.close()
    raise _no_checkpoint(path, step, steps)
  part, _ = checkpoints.restore(wanted, abstract_part)
  checkpoints.close()
  return wanted, part


# --- Checks ------------------------------------------------------------------


def check_model(path: pathlib.Path, model: dict[str, str]):
  """Refuse a model that is not the one the run started from.

  Raises:
    UsageError: the sha256 of the two differ.
  """
  first = json.loads((path / resume.MODEL).read_text())
  if model['sha256'] != first['sha256']:
    commit = first.get('commit')
    revision = f' (--config.model.revision={commit})' if commit else ''
    raise errors.UsageError(
      f'The files in {model["path"]} are not those that the run in {path} '
      f'started from and uses as its frozen reference; put them back{revision},'
      ' or use a new workdir.'
    )


def check_checkpoints(path: pathlib.Path, step: int | None):
  """Raise UsageError if a run has no checkpoints; not a collective."""
  if not (path / 'checkpoints').is_dir():
    raise _no_checkpoint(path, step, [])


def _no_checkpoint(
  path: pathlib.Path, step: int | None, steps: list[int]
) -> errors.UsageError:
  there = ', '.join(map(str, steps)) or 'none'
  return errors.UsageError(
    f'--step is {step}, but the checkpoints in {path} are: {there}.'
  )


def check_shared(workdir: pathlib.Path):
  """Refuse a directory that not all processes see; a collective.

  Process 0 writes a file with a unique name. That needs no lock, so it disturbs
  neither a run that holds the directory nor another one that checks it.

  Raises:
    UsageError: one sentence, in all processes.
  """
  proposals = processes.allgather(
    (f'.processes-{uuid.uuid4().hex}', _newest(workdir))
  )
  name, newest = proposals[0][0], max(newest for _, newest in proposals)
  mark = workdir / name
  try:
    if processes.is_first():
      workdir.mkdir(parents=True, exist_ok=True)
      storage.write(mark, name)
    processes.allgather(None)  # The mark is written.
    seen = processes.allgather(_is_seen(mark, name, newest))
  finally:
    if processes.is_first():
      mark.unlink(missing_ok=True)
  if not all(seen):
    raise errors.UsageError(
      f'--workdir is {workdir}, but process {seen.index(False)} does not see '
      'what another process writes there; allowed: a directory that all '
      'processes share, or gs://BUCKET/FOLDER.'
    )


def _newest(workdir: pathlib.Path) -> int:
  """Step of the newest visible checkpoint; -1 without one, -2 without a folder.

  Opening the folder is a collective, so either all processes must see it or
  none; and all read the same checkpoint.
  """
  folder = workdir / 'checkpoints'
  if not folder.is_dir():
    return -2
  steps = (file.name for file in folder.iterdir())
  return max((int(name) for name in steps if name.isdigit()), default=-1)


def _is_seen(mark: pathlib.Path, text: str, newest: int) -> bool:
  """Look again until it is seen or the time is over: network disks are late."""
  end = time.monotonic() + _SEEN_WITHIN
  while not (
    mark.exists()
    and mark.read_text() == text
    and _newest(mark.parent) >= newest
  ):
    if time.monotonic() > end:
      return False
    for folder in (mark.parent.parent, mark.parent):
      if folder.exists():
        list(folder.iterdir())  # Makes a network disk refresh its cache.
    time.sleep(1.0)
  return True
