"""The run directory: the one thing that a run leaves behind.

config.json  metrics.jsonl  eval.jsonl  baselines.json
checkpoints/  rollouts/  report/

A run that is killed leaves whole files: rows are appended line by line,
everything else is written beside its place and renamed.
"""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import ml_collections

from actfocus_jax.run import checkpoint, metrics, settings


class RunDirectory:
  """Opens or makes a run directory.

  Attributes:
    metrics: Rows of metrics.jsonl, one per training step.
    evaluations: Rows of eval.jsonl.
  """

  def __init__(self, path: pathlib.Path, c: ml_collections.ConfigDict):
    """Makes the directory and writes the config.

    Args:
      path: Checked before by `command.check_workdir`.
      c: The config.
    """
    path.mkdir(parents=True, exist_ok=True)
    self._path = path
    self.write('config.json', settings.to_json(c))
    self.metrics = metrics.MetricsFile(path / 'metrics.jsonl')
    self.evaluations = metrics.MetricsFile(path / 'eval.jsonl')
    self._checkpoints = checkpoint.Checkpoints(
      path / 'checkpoints', keep=c.checkpoint.keep
    )

  def restore(self, state):
    """The newest checkpoint in the place of `state`, or `state` itself.

    Rows that were written after that checkpoint are dropped: their steps will
    be done again.

    Args:
      state: A fresh state; it says which arrays, and where they live.

    Returns:
      The state to go on from.
    """
    latest = self._checkpoints.latest_step()
    if latest is not None:
      state, _ = self._checkpoints.restore(latest, abstract(state))
    kept = 0 if latest is None else latest + 1
    self.metrics.truncate(kept)
    self.evaluations.truncate(kept)
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

  def close(self):
    """Waits for the last checkpoint."""
    self._checkpoints.wait()
    self._checkpoints.close()
    self.metrics.close()
    self.evaluations.close()


def restore_part(path: pathlib.Path, part, step: int | None):
  """Reads part of a checkpoint, such as the parameters alone.

  Args:
    path: A run directory.
    part: Arrays in the structure of the train state, unwanted fields None.
    step: Of the checkpoint; None is the newest.

  Returns:
    The step and the part.

  Raises:
    ValueError: When there is no such checkpoint.
  """
  checkpoints = checkpoint.Checkpoints(path / 'checkpoints')
  steps = checkpoints.all_steps()
  wanted = step if step is not None else max(steps, default=None)
  if wanted not in steps:
    checkpoints.close()
    there = ', '.join(map(str, steps)) or 'none'
    raise ValueError(
      f'--step is {step}, but the checkpoints in {path} are: {there}.'
    )
  part, _ = checkpoints.restore(wanted, abstract(part))
  checkpoints.close()
  return wanted, part


def abstract(tree):
  """Shapes, dtypes and shardings of a pytree of arrays."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def _write(path: pathlib.Path, text: str):
  partial = path.with_name(f'.{path.name}.partial')
  partial.write_text(text)
  os.replace(partial, path)
