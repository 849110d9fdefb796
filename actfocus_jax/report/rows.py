"""Read the JSON-lines files of a run, also while the run writes them."""

import json
import pathlib
from typing import Any


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Return the objects of a file, one a line; [] without a file.

  An incomplete last line is left out.

  Raises:
    ValueError: a complete line is not a JSON object; names the line.
  """
  if not path.exists():
    return []
  lines = path.read_bytes().decode('utf-8', errors='replace').split('\n')[:-1]
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      rows.append(dict(json.loads(line)))
    except (ValueError, TypeError) as error:
      raise ValueError(f'{path}:{number} is not a JSON object') from error
  return rows


def column(
  rows: list[dict[str, Any]], key: str
) -> tuple[list[int], list[float]]:
  """Return (steps, values) of the rows in which `key` has a number."""
  pairs = [(row['step'], row[key]) for row in rows if row.get(key) is not None]
  return [step for step, _ in pairs], [float(value) for _, value in pairs]
