"""Scripted players of Sudoku.

They read the board well and choose numbers badly: a thought names cells and
their valid numbers, and the action often plays another number.
"""

import dataclasses

import numpy as np

from actfocus_jax.envs import sudoku, sudoku_board


@dataclasses.dataclass(frozen=True)
class SudokuCareless:
  """Fills the cells with the fewest valid numbers.

  Attributes:
    skill: probability, per action, of the number that solves the board;
      where mistakes leave no such number, of one that fits.
    length: most actions in one turn.
    habit: probability, per action, of the number 1, whatever the board; what
      remains of 1 is a uniformly random number.
  """

  skill: float = 0.12
  length: int = 2
  habit: float = 0.0

  def respond(
    self, env: sudoku.Sudoku, state: sudoku.State, rng: np.random.Generator
  ) -> tuple[str, list[str]]:
    """Return e.g. `Empty (1,2): [3], (4,1): [2].` and `1,2,3`, `4,1,2`.

    There is a second action only if a second cell has one valid number; any
    other would need more than the board that the model sees. If a cell has no
    valid number left, a number that was placed before is changed.
    """
    valid = {
      index: sudoku_board.valid_numbers(state.cells, index)
      for index in sudoku_board.empty_cells(state.cells)
    }
    chosen = self._choose(valid)
    if not valid[chosen[0]]:
      return self._change(env, state, chosen[0], rng)
    named = ', '.join(
      f'{sudoku_board.place(index, env.size)}: {valid[index]}'
      for index in chosen
    )
    actions = [self._act(env, state, index, rng) for index in chosen]
    return f'Empty {named}.', actions

  def _choose(self, valid: dict[int, list[int]]) -> list[int]:
    fewest = sorted(valid, key=lambda index: len(valid[index]))
    single = [index for index in fewest if len(valid[index]) == 1]
    if not valid[fewest[0]]:
      return fewest[:1]
    return (single or fewest[:1])[: self.length]

  def _change(
    self, env, state: sudoku.State, stuck: int, rng
  ) -> tuple[str, list[str]]:
    own = sudoku.own_cells(state)
    changed = own[rng.integers(len(own))]
    thought = (
      f'Nothing fits into {sudoku_board.place(stuck, env.size)}, so I change '
      f'{sudoku_board.place(changed, env.size)}.'
    )
    return thought, [self._act(env, state, changed, rng)]

  def _act(self, env, state: sudoku.State, index: int, rng) -> str:
    luck = rng.random()
    if luck < self.skill:
      value = _best_number(state, index)
    elif luck < self.skill + self.habit:
      value = 1
    else:
      value = rng.integers(1, env.size + 1)
    row, col = divmod(index, env.size)
    return f'{row + 1},{col + 1},{value}'


@dataclasses.dataclass(frozen=True)
class SudokuOrderly(SudokuCareless):
  """Fills the cells in the order of the state's list, one per turn.

  It is easier to imitate: its thought is copied from one place of the text.
  """

  length: int = 1

  def _choose(self, valid: dict[int, list[int]]) -> list[int]:
    first, *others = [*valid][: self.length]
    return [first, *(index for index in others if valid[index])]


def _best_number(state: sudoku.State, index: int) -> int:
  """Return the stored number if it fits, else the first that does."""
  stored = state.puzzle.solution[index]
  valid = sudoku_board.valid_numbers(state.cells, index)
  return stored if stored in valid else valid[0]
