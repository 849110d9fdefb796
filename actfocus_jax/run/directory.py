"""The run directory: the one thing that a run leaves behind.

config.json  model.json  metrics.jsonl  eval.jsonl  baselines.json
checkpoints/  rollouts/  report/

A run that is killed leaves whole files: rows are appended line by line,
everything else is written beside its place and renamed.
"""

import fcntl
import json
import os
import pathlib
from collections.abc import Iterable
from typing import IO, Any

import ml_collections

from actfocus_jax.run import checkpoint, metrics, settings


class RunDirectory:
  """Opens or makes a run directory, for one process at a time.

  A context manager: leaving it waits for the last checkpoint.

  Attributes:
    metrics: Rows of metrics.jsonl, one per training step.
    evaluations: Rows of eval.jsonl.
  """

  def __init__(
    self,
    path: pathlib.Path,
    c: ml_collections.ConfigDict,
    model: dict[str, str],
  ):
    """Makes the directory, locks it, writes the config and what it starts from.

    Args:
      path: Checked before by `command.check_workdir`.
      c: The config.
      model: What the run starts from: its `path` and `commit`, for people, and
        its `sha256`.

    Raises:
      Refused: When another process is training there, or the run there started
        from another model; nothing has been written then.
    """
    path.mkdir(parents=True, exist_ok=True)
    self._path = path
    self._lock = lock(path / '.lock', wait=False)
    if (path / 'model.json').exists():
      try:
        check_model(path, model)
      except settings.Refused:
        self._lock.close()
        raise
    self.write('model.json', model)
    self.write('config.json', settings.to_json(c))
    self.metrics = metrics.MetricsFile(path / 'metrics.jsonl')
    self.evaluations = metrics.MetricsFile(path / 'eval.jsonl')
    self._checkpoints = checkpoint.Checkpoints(
      path / 'checkpoints', keep=c.checkpoint.keep
    )

  def __enter__(self) -> 'RunDirectory':
    """Returns itself."""
    return self

  def __exit__(self, *exception):
    """Waits for the last checkpoint and lets others in."""
    self._checkpoints.wait()
    self._checkpoints.close()
    self.metrics.close()
    self.evaluations.close()
    self._lock.close()

  def restore(self, wanted):
    """Reads the newest checkpoint.

    What was written after it is dropped: those steps will be done again.

    Args:
      wanted: Shapes, dtypes and shardings of the state.

    Returns:
      The state to go on from, or None when there is no checkpoint.
    """
    latest = self._checkpoints.latest_step()
    state = None
    if latest is not None:
      state, _ = self._checkpoints.restore(latest, wanted)
    kept = 0 if latest is None else latest + 1
    self.metrics.truncate(kept)
    self.evaluations.truncate(kept)
    for file in (self._path / 'rollouts').glob('step_*.jsonl'):
      if int(file.stem.removeprefix('step_')) >= kept:
        file.unlink()
    return state

  def write(self, name: str, content: Any):
    """Writes a JSON file, whole or not at all."""
    _write(self._path / name, json.dumps(content, indent=2) + '\n')

  def write_episodes(self, step: int, records: Iterable[dict[str, Any]]):
    """Writes the episodes of one evaluation for the viewer."""
    folder = self._path / 'rollouts'
    folder.mkdir(exist_ok=True)
    lines = (json.dumps(record) + '\n' for record in records)
    _write(folder / f'step_{step:06d}.jsonl', ''.join(lines))

  def save(self, step: int, state, success: float | None):
    """Starts to write a checkpoint; see `Checkpoints.save`."""
    self._checkpoints.save(step, state, {'step': step}, success=success)


def lock(path: pathlib.Path, *, wait: bool) -> IO[str]:
  """Takes a file lock, which ends with the process or with `close`.

  Args:
    path: The lock file; made if need be.
    wait: Whether to wait for whoever holds it.

  Returns:
    The open file.

  Raises:
    Refused: When somebody holds it and `wait` is False.
  """
  file = path.open('w')
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError as error:
    file.close()
    raise settings.Refused(
      f'--workdir is {path.parent}, where another process is training.'
    ) from error
  return file


def check_model(path: pathlib.Path, model: dict[str, str]):
  """Refuses a model that is not the one a run started from.

  Args:
    path: The run directory.
    model: As of `RunDirectory`.

  Raises:
    Refused: One sentence.
  """
  noted = json.loads((path / 'model.json').read_text())
  if model['sha256'] != noted['sha256']:
    commit = noted.get('commit')
    where = f' (--config.model.revision={commit})' if commit else ''
    raise settings.Refused(
      f'The files in {model["path"]} are not those that the run in {path} '
      f'started from, and are its frozen reference; put them back{where}, or '
      'use a new workdir.'
    )


def restore_part(path: pathlib.Path, part, step: int | None):
  """Reads part of a checkpoint, such as the parameters alone.

  Args:
    path: A run directory.
    part: Shapes, dtypes and shardings in the structure of the train state;
      None for what is not wanted.
    step: Of the checkpoint; None is the newest.

  Returns:
    The step and the part.

  Raises:
    Refused: When there is no such checkpoint.
  """
  checkpoints = checkpoint.Checkpoints(path / 'checkpoints', read_only=True)
  steps = checkpoints.all_steps()
  wanted = step if step is not None else max(steps, default=None)
  if wanted not in steps:
    checkpoints.close()
    there = ', '.join(map(str, steps)) or 'none'
    raise settings.Refused(
      f'--step is {step}, but the checkpoints in {path} are: {there}.'
    )
  part, _ = checkpoints.restore(wanted, part)
  checkpoints.close()
  return wanted, part


def _write(path: pathlib.Path, text: str):
  partial = path.with_name(f'.{path.name}.partial')
  partial.write_text(text)
  os.replace(partial, path)
