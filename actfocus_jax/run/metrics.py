"""The numbers of a run: one JSON object a line, in files that only grow.

A line is written whole and flushed, so a run that is killed loses at most the
line it was writing. A run that resumes at step n first drops the lines of step
n and later, which it is about to write again.

An object in a bucket cannot be appended to. There all lines are kept in memory
and written again with each new one, as one object that is whole or not there:
1000 rows of 2 kB are 2 MB at each step.

JSON has no NaN. A number that is not finite is written as null and named:
`{"step": 3, "actor/loss": null, "nonfinite": {"actor/loss": "nan"}}`; `read`
puts it back.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from actfocus_jax.run import storage

_NONFINITE = 'nonfinite'


class MetricsFile:
  """A file of rows; every row is a flat dict with an integer 'step'."""

  def __init__(
    self,
    path: str | pathlib.Path,
    *,
    writes: bool = True,
    check: Callable[[], None] = lambda: None,
  ):
    """Names the file, which is made by the first `append`.

    Args:
      path: of the file, or of an object in a bucket.
      writes: False where another process writes the same rows: `append` and
        `truncate` do nothing then.
      check: called before each write; raises where the file has come to be
        another process's.
    """
    remote = storage.is_remote(path)
    self._path = path if remote else pathlib.Path(path)
    self._writes, self._check = writes, check
    self._file = None
    self._lines: list[str] | None = None  # of an object, once it is read

  def append(self, row: Mapping[str, Any]) -> None:
    """Writes one row and flushes it.

    Args:
      row: 'step' and numbers (Python, numpy or jax scalars), strings or None.

    Raises:
      ValueError: no 'step', or a value that is no scalar; names the key.
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
    """Drops every row of `step` and later, and a last line cut short.

    The file is replaced in one move: a kill in between leaves the old one.

    Raises:
      ValueError: a line other than the last is no JSON object.
    """
    self.close()
    if not self._writes:
      return
    self._check()
    is_there = self._path.exists()
    found = _lines(self._path) if is_there else []
    kept = [f'{line}\n' for line, row in found if row['step'] < step]
    if storage.is_remote(self._path):
      self._lines = kept
      if is_there:
        storage.write(self._path, ''.join(kept))
    elif is_there:
      self._replace(kept)

  def _replace(self, lines: list[str]) -> None:
    beside = self._path.with_name(self._path.name + '.tmp')
    with beside.open('w', encoding='utf-8') as file:
      file.writelines(lines)
      file.flush()
      os.fsync(file.fileno())
    beside.replace(self._path)

  def close(self) -> None:
    """Closes the file; a later `append` opens it again."""
    if self._file is not None:
      self._file.close()
      self._file = None


def read(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows of a file, oldest first; [] where there is no file.

  A last line cut short is left out, so a file can be read while it is written.

  Raises:
    ValueError: a line other than the last is no JSON object.
  """
  path = path if storage.is_remote(path) else pathlib.Path(path)
  if not path.exists():
    return []
  return [_decode(row) for _, row in _lines(path)]


def _lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  """Pairs each whole line with its object."""
  lines = path.read_text(encoding='utf-8').split('\n')
  pairs = []
  # What follows the last newline is '' or a line cut short.
  for number, line in enumerate(lines[:-1], start=1):
    try:
      row = json.loads(line)
      row['step']
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(f'{path}:{number} is no row of metrics') from error
    pairs.append((line, row))
  return pairs


def _encode(row: Mapping[str, Any]) -> dict[str, Any]:
  """Makes a row that JSON can hold."""
  if 'step' not in row:
    raise ValueError(f"a row of metrics needs 'step', got {sorted(row)}")
  values = {key: _scalar(key, value) for key, value in row.items()}
  odd = {
    key: str(value)
    for key, value in values.items()
    if isinstance(value, float) and not math.isfinite(value)
  }
  return values | dict.fromkeys(odd) | ({_NONFINITE: odd} if odd else {})


def _decode(row: dict[str, Any]) -> dict[str, Any]:
  odd = row.pop(_NONFINITE, {})
  return row | {key: float(word) for key, word in odd.items()}


def _scalar(key: str, value: Any) -> int | float | str | bool | None:
  """Returns a Python scalar for a Python, numpy or jax one."""
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if getattr(value, 'size', None) == 1:
    return value.item()
  raise ValueError(f'metric {key!r} is no scalar: {value!r}')
