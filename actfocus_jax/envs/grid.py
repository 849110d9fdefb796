"""Cells on a grid: the four moves, boards written as text, shortest paths."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable

Cell = tuple[int, int]

# (row, column) change of each action; rows count downwards.
MOVES = {'Up': (-1, 0), 'Down': (1, 0), 'Left': (0, -1), 'Right': (0, 1)}


def neighbour(cell: Cell, action: str) -> Cell:
  """Return the cell one move away, inside the grid or not."""
  row, col = MOVES[action]
  return cell[0] + row, cell[1] + col


def distance(a: Cell, b: Cell) -> int:
  """Return the number of moves between two cells of an empty grid."""
  return abs(a[0] - b[0]) + abs(a[1] - b[1])


def parse(board: str, symbols: str) -> dict[Cell, str]:
  """Read a board, one row of symbols per line; return the symbol of each cell.

  Raises:
    ValueError: no rows, rows of unequal length, or an unknown symbol.
  """
  rows = [line.strip() for line in board.strip().splitlines()]
  unknown = sorted(set(''.join(rows)) - set(symbols))
  if unknown:
    raise ValueError(f'unknown symbols {unknown}; a board has {list(symbols)}')
  if not rows or len({len(row) for row in rows}) != 1:
    raise ValueError(f'a board needs rows of one length, got {rows}')
  return {
    (r, c): symbol for r, row in enumerate(rows) for c, symbol in enumerate(row)
  }


def cells_of(cells: dict[Cell, str], symbols: str) -> list[Cell]:
  """Return the cells that hold one of the symbols, row by row."""
  return [cell for cell, symbol in cells.items() if symbol in symbols]


def shortest_path(
  start: Hashable,
  successors: Callable[[Hashable], Iterable[tuple[str, Hashable]]],
  is_goal: Callable[[Hashable], bool],
  most: int | None = None,
) -> list[str] | None:
  """Find a shortest path by breadth-first search.

  Args:
    start: node to start from.
    successors: node -> pairs (action, next node).
    is_goal: node -> True if the node ends the search.
    most: number of nodes after which the search is given up.

  Returns:
    Its actions; None without a path, or if none was found in time.
  """
  if is_goal(start):
    return []
  came_from = {start: None}
  queue = deque([start])
  while queue and (most is None or len(came_from) < most):
    node = queue.popleft()
    for action, following in successors(node):
      if following in came_from:
        continue
      came_from[following] = (node, action)
      if is_goal(following):
        actions = []
        while came_from[following] is not None:
          following, action = came_from[following]
          actions.append(action)
        return actions[::-1]
      queue.append(following)
  return None
