"""Rows of metrics: one JSON object a line, in files that only grow.

A line is written whole and flushed, so a killed run loses at most the line it
was writing. A run that resumes at step n first drops the lines of step n and
later, and writes them again.

An object in a bucket cannot be appended to. There all lines stay in memory and
are written again with each new one, as one object that is whole or absent.

JSON has no NaN. A number that is not finite is written as null and named:
`{"step": 3, "actor/loss": null, "nonfinite": {"actor/loss": "nan"}}`; `read`
restores it.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.monitoring

from actfocus_jax.run import storage

_NONFINITE = 'nonfinite'
_COMPILED = '/jax/core/compile/backend_compile_duration'
_compilations = 0
_is_counting = False


def count_compilations() -> int:
  """Number of programs compiled in this process since the first call."""
  global _is_counting
  if not _is_counting:
    jax.monitoring.register_event_duration_secs_listener(_on_event)
    _is_counting = True
  return _compilations


def _on_event(event: str, duration: float, **_):
  global _compilations
  _compilations += event == _COMPILED


class MetricsFile:
  """File of rows; each row is a flat dict with an integer 'step'."""

  def __init__(
    self,
    path: str | pathlib.Path,
    *,
    writes: bool = True,
    check: Callable[[], None] = lambda: None,
  ):
    """Name the file; the first `append` creates it.

    Args:
      path: path of the file, or of an object in a bucket.
      writes: False if another process writes the same rows; `append` and
        `truncate` do nothing then.
      check: called before each write; raises if another process has taken the
        run directory.
    """
    remote = storage.is_remote(path)
    self._path = path if remote else pathlib.Path(path)
    self._writes, self._check = writes, check
    self._file = None
    self._lines: list[str] | None = None  # of an object, once it was read

  def append(self, row: Mapping[str, Any]) -> None:
    """Write one row and flush it.

    Raises:
      ValueError: no 'step', or a value that is not a scalar; names the key.
    """
    line = json.dumps(_encode(row), allow_nan=False) + '\n'
    if not self._writes:
      return
    self._check()
    if storage.is_remote(self._path):
      if self._lines is None:
        self.truncate(math.inf)
      self._lines.append(line)
      storage.write(self._path, ''.join(self._lines))
      return
    if self._file is None:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      if self._path.exists():
        self.truncate(math.inf)
      self._file = self._path.open('a', encoding='utf-8')
    self._file.write(line)
    self._file.flush()

  def truncate(self, step: float) -> None:
    """Drop every row of `step` and later, and an incomplete last line.

    The file is replaced in one move: a kill before that leaves the old one.

    Raises:
      ValueError: a line other than the last is not a row.
    """
    self.close()
    if not self._writes:
      return
    self._check()
    exists = self._path.exists()
    pairs = _lines(self._path) if exists else []
    kept = [f'{line}\n' for line, row in pairs if row['step'] < step]
    if storage.is_remote(self._path):
      self._lines = kept
      if exists:
        storage.write(self._path, ''.join(kept))
    elif exists:
      partial = self._path.with_name(self._path.name + '.tmp')
      with partial.open('w', encoding='utf-8') as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
      partial.replace(self._path)

  def close(self) -> None:
    """Close the file; a later `append` opens it again."""
    if self._file is not None:
      self._file.close()
      self._file = None


def read(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """Return the rows of a file, oldest first; [] without a file.

  An incomplete last line is left out, so a file can be read while it is
  written.

  Raises:
    ValueError: a line other than the last is not a row.
  """
  path = path if storage.is_remote(path) else pathlib.Path(path)
  if not path.exists():
    return []
  rows = []
  for _, row in _lines(path):
    nonfinite = row.pop(_NONFINITE, {})
    rows.append(row | {key: float(text) for key, text in nonfinite.items()})
  return rows


def _lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  """Pair each complete line with its row."""
  lines = path.read_text(encoding='utf-8').split('\n')
  pairs = []
  # The text after the last newline is '' or an incomplete line.
  for number, line in enumerate(lines[:-1], start=1):
    try:
      row = json.loads(line)
      row['step']
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(f'{path}:{number} is not a row of metrics') from error
    pairs.append((line, row))
  return pairs


def _encode(row: Mapping[str, Any]) -> dict[str, Any]:
  if 'step' not in row:
    raise ValueError(f"a row of metrics needs 'step', got {sorted(row)}")
  values = {key: _scalar(key, value) for key, value in row.items()}
  nonfinite = {
    key: str(value)
    for key, value in values.items()
    if isinstance(value, float) and not math.isfinite(value)
  }
  named = {_NONFINITE: nonfinite} if nonfinite else {}
  return values | dict.fromkeys(nonfinite) | named


def _scalar(key: str, value: Any) -> int | float | str | bool | None:
  """Return a Python scalar for a Python, numpy or jax one."""
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if getattr(value, 'size', None) == 1:
    return value.item()
  raise ValueError(f'metric {key!r} is not a scalar: {value!r}')
