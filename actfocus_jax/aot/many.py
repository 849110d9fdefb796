"""The table: sizes and algorithms on some slices, and the smallest that fits.

What is not known yet is compiled in several processes (threads of one end in a
crash of the compiler now and then), and every answer is kept, so the command
can be stopped and given again.
"""

import dataclasses
import json
import multiprocessing
import pathlib
import sys
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

from actfocus_jax.aot import cells, roofline, table, topology, workload


@dataclasses.dataclass(frozen=True)
class Cell:
  """One answer of many.

  Attributes:
    size: Of the model.
    algo: Of the config.
    where: The slices.
    changes: Fields of the config, `section__name`, and their values.
  """

  size: str
  algo: str
  where: topology.Topology
  changes: tuple[tuple[str, int], ...] = ()

  def __str__(self) -> str:
    changed = ''.join(f', {name}={value}' for name, value in self.changes)
    return f'{self.size} {self.algo} on {self.where}{changed}'


@dataclasses.dataclass(frozen=True)
class Asks:
  """How to make a question of a cell.

  Attributes:
    config_of: (size, algo, **changes) -> (config, shape of the model).
    workload_of: (config) -> how long episodes are.
    efficiency: Shares of the peaks that are reached.
    price: Dollars per chip and hour; None is the list price.
    out: Directory for what is found.
    jobs: Cells that are compiled at a time, each in a process of its own.
  """

  config_of: Callable[..., tuple[Any, Any]]
  workload_of: Callable[[Any], workload.Workload]
  efficiency: roofline.Efficiency
  price: float | None
  out: pathlib.Path
  jobs: int = 1

  def question(self, cell: Cell) -> cells.Question:
    """What is asked of a cell."""
    c, config = self.config_of(cell.size, cell.algo, **dict(cell.changes))
    work = self.workload_of(c)
    return cells.Question(
      c, config, cell.where, work, self.efficiency, self.price
    )

  def answers(self, searches: Sequence[Sequence[Cell]]) -> list[dict[str, Any]]:
    """Answers several searches at a time, new or kept.

    Args:
      searches: Of each the cells are asked in turn until one fits.

    Returns:
      Of each search the answer of the first that fits, or of the last one, with
      the names of its row.
    """
    tasks = [
      [(cell, self.question(cell)) for cell in search] for search in searches
    ]
    spawn = multiprocessing.get_context('spawn')
    with futures.ProcessPoolExecutor(self.jobs, mp_context=spawn) as pool:
      begun = [pool.submit(_search, task, self.out) for task in tasks]
      try:
        for done, one in enumerate(futures.as_completed(begun), 1):
          one.result()
          note(f'{done} of {len(tasks)} done')
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return [one.result() for one in begun]


def _search(
  task: Sequence[tuple[Cell, cells.Question]], out: pathlib.Path
) -> dict[str, Any]:
  for cell, question in task:
    told = _told(str(cell), question, out)
    if told['fits']:
      break
  return told | {'size': cell.size.upper(), 'algo': cell.algo}


def _told(
  name: str, question: cells.Question, out: pathlib.Path
) -> dict[str, Any]:
  def tell(text: str):
    note(f'{name}: {text}')

  told, is_kept = cells.kept(question, out, note=tell)
  does = 'fits' if told['fits'] else told.get('refused', 'does not fit')
  if not is_kept:
    tell(does)
  return told


def note(text: str):
  """Tells of progress."""
  print(f'  {text}', file=sys.stderr, flush=True)


def table_of(
  asks: Asks,
  sizes: Sequence[str],
  algos: Sequence[str],
  wheres: Sequence[topology.Topology],
) -> str:
  """Compiles all cells; writes and returns the table as Markdown."""
  pairs = [(size, algo) for size in sizes for algo in algos]
  kinds = dict.fromkeys(where.chip.name for where in wheres)
  named = asks.answers(
    [[Cell(*pair, where)] for pair in pairs for where in wheres]
  )
  _write(asks.out, named, [])
  smallest = asks.answers(
    [
      [Cell(*pair, where) for where in topology.all_of(kind)]
      for pair in pairs
      for kind in kinds
    ]
  )
  _write(asks.out, named, smallest)
  return (asks.out / 'table.md').read_text()


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
