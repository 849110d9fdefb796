"""The table: sizes and algorithms on some slices, and the smallest that fits.

Every cell is compiled in turn and kept, so the command can be stopped and
given again.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from actfocus_jax.aot import cells, roofline, table, topology, workload


@dataclasses.dataclass(frozen=True)
class Asks:
  """How to make a question of a size and an algorithm.

  Attributes:
    config_of: (size, algo, **changes) -> (config, shape of the model).
    workload_of: (config) -> how long episodes are.
    efficiency: Shares of the peaks that are reached.
    price: Dollars per chip and hour; None is the list price.
    out: Directory for what is found.
    note: Told of progress.
  """

  config_of: Callable[..., tuple[Any, Any]]
  workload_of: Callable[[Any], workload.Workload]
  efficiency: roofline.Efficiency
  price: float | None
  out: pathlib.Path
  note: Callable[[str], None]

  def ask(
    self, size: str, algo: str, where: topology.Topology, **changes: int
  ) -> dict[str, Any]:
    """The answer, new or kept, with the names of its row."""
    c, config = self.config_of(size, algo, **changes)
    question = cells.Question(
      c, config, where, self.workload_of(c), self.efficiency, self.price
    )
    self.note(f'{size} {algo} on {where}')
    told, is_kept = cells.kept(question, self.out, note=self.note)
    does = 'fits' if told['fits'] else told.get('refused', 'does not fit')
    self.note(f'{size} {algo} on {where}: {does}{" (kept)" * is_kept}')
    return told | {'size': size.upper(), 'algo': algo}


def table_of(
  asks: Asks,
  sizes: Sequence[str],
  algos: Sequence[str],
  wheres: Sequence[topology.Topology],
) -> str:
  """Compiles all cells; writes and returns the table as Markdown."""
  named, smallest = [], []
  for size in sizes:
    for algo in algos:
      named += [asks.ask(size, algo, where) for where in wheres]
      _write(asks.out, named, smallest)
  for size in sizes:
    for algo in algos:
      for kind in dict.fromkeys(where.chip.name for where in wheres):
        smallest += _smallest(asks, size, algo, kind)
        _write(asks.out, named, smallest)
  return (asks.out / 'table.md').read_text()


def _smallest(asks: Asks, size: str, algo: str, kind: str) -> Iterator[dict]:
  """The first slice of a generation that fits; the last one if none does."""
  told = {}
  for where in topology.all_of(kind):
    told = asks.ask(size, algo, where)
    if told['fits']:
      break
  yield told


def _write(out: pathlib.Path, named: list[dict], smallest: list[dict]):
  """What is known so far."""
  both = {'named': named, 'smallest': smallest}
  (out / 'table.json').write_text(json.dumps(both, indent=1))
  text = table.markdown(named)
  if smallest:
    text += '\n\nThe smallest slice that fits:\n\n'
    text += table.markdown(smallest)
  text += f'\n\n{table.assumptions(named + smallest)}'
  (out / 'table.md').write_text(f'{text}\n')
