"""Sudoku boards: rules, completions, generated boards, boards as text.

A board is a tuple of numbers, row by row; 0 stands for an empty cell, and an
index counts cells row by row from 0. Sizes are 4 (2 x 2 boxes) and 9.

The stages of one generated board:

1. An empty grid is filled by backtracking: always at a cell with the fewest
   numbers left, which are tried in random order.
2. Some cells are blanked, each as likely as any other. The other cells are the
   givens; the full grid is the stored solution.
3. There may be other solutions: no board is redrawn to make its solution
   unique.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np

Cells = tuple[int, ...]

BOX_SIZES = {4: 2, 9: 3}
# A search that takes longer is given up, after about a second. To fill an empty
# 9x9 grid takes 82 to 108 steps (5,000 seeds), well-known hard boards take up
# to 75,000; some take so many that no limit would do.
_MAX_SEARCH = 200_000
# In a set of numbers the bit of `value` is 1 << value - 1.
_BITS = tuple(1 << k for k in range(max(BOX_SIZES)))


class TooHard(RuntimeError):
  """A board that takes too long to complete."""


@dataclasses.dataclass(frozen=True)
class Puzzle:
  """The constant part: the given numbers and the stored solution."""

  given: Cells
  solution: Cells


def generate(rng: np.random.Generator, *, size: int, blanks: int) -> Puzzle:
  """Draw a board; its solution is the grid it was made from.

  `size` is 4 or 9; at most size * size cells are blanked.
  """
  solution = next(completions((0,) * size**2, rng))
  blanked = set(rng.choice(size**2, size=blanks, replace=False).tolist())
  given = tuple(
    0 if index in blanked else value for index, value in enumerate(solution)
  )
  return Puzzle(given, solution)


# --- Rules -------------------------------------------------------------------


@functools.cache
def units(size: int) -> tuple[dict[str, tuple[int, ...]], ...]:
  """Return the cells of each cell's row, column and box, by these names."""
  box = BOX_SIZES[size]
  kinds = {
    'row': lambda row, col: row,
    'column': lambda row, col: col,
    'box': lambda row, col: (row // box, col // box),
  }
  cells = [divmod(index, size) for index in range(size**2)]
  return tuple(
    {
      name: tuple(i for i, a in enumerate(cells) if unit(*a) == unit(*cell))
      for name, unit in kinds.items()
    }
    for cell in cells
  )


@functools.cache
def _peers(size: int) -> tuple[tuple[int, ...], ...]:
  """Return for each cell the cells that must differ from it."""
  return tuple(
    tuple(sorted({*itertools.chain(*around.values())} - {index}))
    for index, around in enumerate(units(size))
  )


def conflict(cells: Cells, index: int, value: int) -> str | None:
  """Return `row`, `column` or `box` where another cell has the number."""
  for name, unit in units(_size(cells))[index].items():
    if any(cells[other] == value for other in unit if other != index):
      return name
  return None


def valid_numbers(cells: Cells, index: int) -> list[int]:
  """Return the numbers that no other cell of row, column and box has."""
  size = _size(cells)
  taken = {cells[other] for other in _peers(size)[index]}
  return [value for value in range(1, size + 1) if value not in taken]


def empty_cells(cells: Cells) -> list[int]:
  """Return the indices of the empty cells, row by row."""
  return [index for index, value in enumerate(cells) if not value]


def _size(cells: Cells) -> int:
  return math.isqrt(len(cells))


# --- Completions -------------------------------------------------------------


def completions(
  cells: Cells, rng: np.random.Generator | None = None
) -> Iterator[Cells]:
  """Yield the completions of a board, each once.

  `rng` draws the order in which numbers are tried; None is ascending.

  Raises:
    TooHard: the search takes too many steps.
  """
  options = [(1 << _size(cells)) - 1] * len(cells)
  for index, value in enumerate(cells):
    if value:
      bit = _BITS[value - 1]
      if not options[index] & bit:
        return
      options = _placed(options, index, bit)
  yield from _search(options, empty_cells(cells), rng, itertools.count())


def _search(
  options: list[int],
  empty: list[int],
  rng: np.random.Generator | None,
  steps: Iterator[int],
) -> Iterator[Cells]:
  """Complete a board given as a set of bits per cell: the numbers left."""
  if next(steps) >= _MAX_SEARCH:
    raise TooHard(f'no answer in {_MAX_SEARCH} steps')
  if not empty:
    yield tuple(bit.bit_length() for bit in options)
    return
  index = min(empty, key=lambda cell: options[cell].bit_count())
  ways = [bit for bit in _BITS if options[index] & bit]
  if rng is not None:
    ways = [ways[k] for k in rng.permutation(len(ways))]
  others = [other for other in empty if other != index]
  for bit in ways:
    yield from _search(_placed(options, index, bit), others, rng, steps)


def _placed(options: list[int], index: int, bit: int) -> list[int]:
  options = options.copy()
  options[index] = bit
  for other in _peers(_size(options))[index]:
    options[other] &= ~bit
  return options


# --- Boards as text ----------------------------------------------------------


def parse(board: str, size: int) -> Puzzle:
  """Read a board; without a solution it gets one.

  Args:
    board: digits row by row, 0 or . for an empty cell, white space anywhere;
      optionally `/` and the solution.
    size: 4 or 9.

  Raises:
    ValueError: not a board, without a solution, or with a wrong one.
  """
  parts = board.split('/')
  if len(parts) > 2:
    raise ValueError(f'a board has at most one /, got {len(parts) - 1}')
  given = _read_cells(parts[0], size, 'board')
  if len(parts) == 1:
    try:
      solution = next(completions(given), None)
    except TooHard as error:
      raise ValueError(
        f'the board is too hard to solve ({error}); add / and the solution'
      ) from error
    if solution is None:
      raise ValueError('the board cannot be solved')
    return Puzzle(given, solution)
  solution = _read_cells(parts[1], size, 'solution of the board')
  if 0 in solution:
    raise ValueError('the solution of the board has empty cells')
  for index, value in enumerate(given):
    if value and solution[index] != value:
      raise ValueError(
        f'the board gives {value} in {place(index, size)}, its solution has '
        f'{solution[index]}'
      )
  return Puzzle(given, solution)


def place(index: int, size: int) -> str:
  """Return a cell as the model reads and writes it, counted from 1."""
  row, col = divmod(index, size)
  return f'({row + 1},{col + 1})'


def _read_cells(text: str, size: int, what: str) -> Cells:
  digits = ''.join(text.split()).replace('.', '0')
  allowed = '0123456789'[: size + 1]
  unknown = sorted(set(digits) - set(allowed))
  if unknown:
    raise ValueError(
      f'unknown symbols {unknown}; a {size}x{size} {what} has 0 to {size} and .'
    )
  if len(digits) != size**2:
    raise ValueError(
      f'a {size}x{size} {what} has {size**2} cells, got {len(digits)}'
    )
  cells = tuple(map(int, digits))
  for index, value in enumerate(cells):
    unit = conflict(cells, index, value) if value else None
    if unit:
      raise ValueError(
        f'the {what} has {value} twice in the {unit} of {place(index, size)}'
      )
  return cells
