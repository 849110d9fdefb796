"""Sudoku: fill the empty cells so that no row, column or box repeats a number.

One step:

1. The action is searched for a placement: a row, a column and a number, in one
   of seven forms. Any string may come; none raises an error.
2. Invalid, reward -0.1: no placement found, a row, column or number out of
   range, a given cell, the number that stands there already, or one that
   another cell of the row, column or box has. The board stays as it is.
3. Valid: the number is placed. In an empty cell it is worth 1 if the stored
   solution has it there and 0.5 if not. In a cell that was filled before it is
   worth nothing, or as much again with `allow_refill_reward`. A filled cell can
   be changed but never emptied, so no cell is paid twice.
4. A full board obeys the rules, for only valid numbers get onto it: it is
   solved, stored solution or not, which gives 10 more.
5. Done when solved, or after `max_steps` actions, valid or not.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from actfocus_jax.envs import base, sudoku_board

SOLUTION_REWARD = 1.0
VALID_REWARD = 0.5
INVALID_REWARD = -0.1
SOLVED_REWARD = 10.0

# Forms of a placement; the first that is found anywhere in an action counts.
FORMS = (
  'place V at row R col C',
  'place V at (R,C)',
  'place V at R,C',
  'V at R,C',
  'V at (R,C)',
  '(R,C,V)',
  'R,C,V',
)
# A number stands alone: no sign or digit before it, no part of a decimal. The
# signs are plus, hyphen, minus and en dash.
_BEFORE, _AFTER = r'(?<![\d.+\-\u2212\u2013])', r'(?!\.?\d)'
# More digits than any row, column or number has; more are cut off, since
# Python reads no number of thousands of digits.
_DIGITS = 3
# The valid numbers are listed when no more cells than this are empty.
_LISTED = 10
_RULE = '=' * 50

_INSTRUCTIONS = """\
You play {size}x{size} Sudoku. Fill every empty cell so that each row, each \
column and each {box}x{box} box has all numbers from 1 to {size}.
Symbols: [v] a given number, which stays; v a number of yours; . empty.
Cells are (row,column), counted from 1 at the top left.
A number that fits into an empty cell gives 1 if it is the one of the solution \
and 0.5 if not; a full board gives 10. {refill}
An action that is against the rules or cannot be read costs 0.1.
An action is row,column,number: 2,3,1 places a 1 in row 2, column 3. So does \
place 1 at row 2 col 3."""
_REFILL = 'You may change a cell that you filled, which gives {}.'


@dataclasses.dataclass(frozen=True)
class State:
  """The board, the number of actions taken, and feedback on the last one."""

  puzzle: sudoku_board.Puzzle
  cells: sudoku_board.Cells
  steps: int = 0
  feedback: str = ''


class Sudoku:
  """The environment; see the module's docstring for its dynamics."""

  actions = ()

  def __init__(
    self,
    *,
    size: int = 4,
    blanks: int = 6,
    max_steps: int = 16,
    allow_refill_reward: bool = False,
    instructions: str | None = None,
  ):
    """Fix the kind of board; configs/README.md explains the fields."""
    if size not in sudoku_board.BOX_SIZES:
      raise ValueError(f'size must be 4 or 9, got {size}')
    if not 1 <= blanks <= size**2:
      raise ValueError(f'blanks must be in [1, {size**2}], got {blanks}')
    if max_steps < 1:
      raise ValueError(f'max_steps must be >= 1, got {max_steps}')
    self.size, self.blanks, self.max_steps = size, blanks, max_steps
    self.allow_refill_reward = allow_refill_reward
    box = sudoku_board.BOX_SIZES[size]
    refill = _REFILL.format('the same' if allow_refill_reward else 'nothing')
    default = _INSTRUCTIONS.format(size=size, box=box, refill=refill)
    self.instructions = default if instructions is None else instructions

  def reset(self, seed: int) -> tuple[State, str]:
    """Draw a board that can be solved."""
    sequence = np.random.SeedSequence(seed, spawn_key=(0,))
    puzzle = sudoku_board.generate(
      np.random.default_rng(sequence), size=self.size, blanks=self.blanks
    )
    return self._start(puzzle)

  def load(self, board: str, *, seed: int = 0) -> tuple[State, str]:
    """Read a board of this environment's size, with any number of blanks.

    Args:
      board: see `sudoku_board.parse`, which raises the ValueErrors.
      seed: unused; a board has no noise.
    """
    del seed
    return self._start(sudoku_board.parse(board, self.size))

  def boards_are_lines(self, lines: Sequence[str]) -> bool:
    """Return whether each line of a file is a board and not a row of one.

    False for as many lines as a board has rows, with as many cells in each.
    """
    widths = {len(''.join(line.split())) for line in lines}
    return len(lines) != self.size or widths != {self.size}

  def is_solved(self, state: State) -> bool:
    """Return whether the board is full."""
    return is_solved(state)

  def step(self, state: State, action: str) -> tuple[State, base.Step]:
    """Run one action. A state that is done stays as it is, with reward 0.

    The info has `cells_placed`, the cells filled by now that were not given,
    and `cells_correct`, those of them that agree with the stored solution.
    """
    following, reward = state, 0.0
    if not self._is_done(state):
      following, reward = self._judge(state, action)
    own = own_cells(following)
    return following, base.Step(
      text=self.render(following),
      reward=reward,
      done=self._is_done(following),
      success=is_solved(following),
      info={
        'effective': following.cells != state.cells,
        'cells_placed': len(own),
        'cells_correct': sum(
          following.cells[index] == state.puzzle.solution[index]
          for index in own
        ),
      },
    )

  def render(self, state: State) -> str:
    """Write the board, the feedback on the last action, and the progress."""
    total = self.size**2
    empty = sudoku_board.empty_cells(state.cells)
    placed = len(own_cells(state))
    lines = [_RULE, f'Sudoku {self.size}x{self.size}', _RULE]
    lines += _rows(state, self.size)
    lines.append('Legend: [v] given, v placed, . empty')
    if state.feedback:
      lines.append(f'Last move: {state.feedback}')
    if 0 < len(empty) <= _LISTED:
      lines.append('Valid numbers of the empty cells:')
      for index in empty:
        valid = sudoku_board.valid_numbers(state.cells, index)
        lines.append(f'  - {sudoku_board.place(index, self.size)}: {valid}')
    lines += [
      f'Progress: {total - len(empty)}/{total} cells filled '
      f'({total - len(empty) - placed} initial, {placed} placed)',
      f'Steps: {state.steps}/{self.max_steps}',
    ]
    return '\n'.join(lines)

  def _start(self, puzzle: sudoku_board.Puzzle) -> tuple[State, str]:
    state = State(puzzle, puzzle.given)
    return state, self.render(state)

  def _is_done(self, state: State) -> bool:
    return is_solved(state) or state.steps >= self.max_steps

  def _judge(self, state: State, action: str) -> tuple[State, float]:
    """Return the state after an action, and its reward."""
    placement = read(action)
    state = dataclasses.replace(state, steps=state.steps + 1)
    problem = self._problem(state, placement)
    if problem:
      feedback = f'Invalid: {problem}'
      return dataclasses.replace(state, feedback=feedback), INVALID_REWARD
    row, col, value = placement
    index = (row - 1) * self.size + col - 1
    was_empty = not state.cells[index]
    cells = (*state.cells[:index], value, *state.cells[index + 1 :])
    following = dataclasses.replace(
      state, cells=cells, feedback=f'{value} placed at ({row},{col}).'
    )
    reward = 0.0
    if was_empty or self.allow_refill_reward:
      is_stored = value == state.puzzle.solution[index]
      reward = SOLUTION_REWARD if is_stored else VALID_REWARD
    if is_solved(following):
      reward += SOLVED_REWARD
    return following, reward

  def _problem(
    self, state: State, placement: tuple[int, int, int] | None
  ) -> str | None:
    """Return a sentence on an invalid placement, or None if it is valid.

    Of the model's own words it repeats only small numbers: they must not come
    back to the model as the words of the environment.
    """
    if placement is None:
      return 'no placement found.'
    row, col, value = placement
    if not all(1 <= number <= self.size for number in placement):
      return f'row, column and number go from 1 to {self.size}.'
    index = (row - 1) * self.size + col - 1
    if state.puzzle.given[index]:
      return f'({row},{col}) is given.'
    if state.cells[index] == value:
      return f'({row},{col}) is {value} already.'
    unit = sudoku_board.conflict(state.cells, index, value)
    return f'the {unit} of ({row},{col}) has a {value}.' if unit else None


def read(action: str) -> tuple[int, int, int] | None:
  """Return row, column and number of a placement in a string, in range or not.

  None without a placement.
  """
  for pattern in _PATTERNS:
    match = pattern.search(action)
    if match:
      digits = (match[name].lstrip('0')[:_DIGITS] for name in 'RCV')
      row, col, value = (int(number or '0') for number in digits)
      return row, col, value
  return None


def is_solved(state: State) -> bool:
  """Return whether no cell is empty; a filled board obeys the rules."""
  return 0 not in state.cells


def own_cells(state: State) -> list[int]:
  """Return the indices of the filled cells that were not given, in order."""
  pairs = zip(state.cells, state.puzzle.given, strict=True)
  return [index for index, (now, given) in enumerate(pairs) if now != given]


def _pattern(form: str) -> re.Pattern[str]:
  """Return the regular expression of a form."""
  parts = {
    ' ': r'\s+',
    '(': r'\(\s*',
    ',': r'\s*,\s*',
    ')': r'\s*\)',
    **{name: f'{_BEFORE}(?P<{name}>[0-9]+){_AFTER}' for name in 'RCV'},
  }
  # An upper-case letter is a number, all others stand for themselves.
  return re.compile(
    ''.join(parts.get(symbol, symbol) for symbol in form), re.IGNORECASE
  )


_PATTERNS = tuple(_pattern(form) for form in FORMS)


def _rows(state: State, size: int) -> list[str]:
  """Return the lines of the grid, with rules between the boxes."""
  box = sudoku_board.BOX_SIZES[size]
  lines = []
  for row in range(size):
    if row and row % box == 0:
      lines.append('-' * (3 * size + 2 * (box - 1)))
    line = ''
    for col in range(size):
      index = row * size + col
      value = state.cells[index] or '.'
      line += '| ' if col and col % box == 0 else ''
      line += f'[{value}]' if state.puzzle.given[index] else f' {value} '
    lines.append(line.rstrip())
  return lines
