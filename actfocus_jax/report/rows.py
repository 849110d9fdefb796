"""Reads the JSON-lines files of a run, also while the run is writing them."""

import json
import pathlib
from typing import Any

from actfocus_jax.run import storage


def place(path: str | pathlib.Path) -> pathlib.Path:
  """Returns a path as such; a string is read as `storage.path` reads it.

  Raises:
    ValueError: for gs:// where the package for buckets is missing.
  """
  if isinstance(path, pathlib.PurePath):
    return path
  return storage.path(path, 'the place')


def read(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """Returns the objects of a file, one a line; [] where there is no file.

  What follows the last newline is a line cut short and is left out.

  Raises:
    ValueError: a whole line is no JSON object; names the line.
  """
  path = place(path)
  if not path.exists():
    return []
  lines = path.read_bytes().decode('utf-8', errors='replace').split('\n')[:-1]
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      rows.append(dict(json.loads(line)))
    except (ValueError, TypeError) as error:
      raise ValueError(f'{path}:{number} is no JSON object') from error
  return rows


def column(
  rows: list[dict[str, Any]], key: str
) -> tuple[list[int], list[float]]:
  """Returns (steps, values) of the rows where `key` holds a number."""
  pairs = [(row['step'], row[key]) for row in rows if row.get(key) is not None]
  return [step for step, _ in pairs], [float(value) for _, value in pairs]
