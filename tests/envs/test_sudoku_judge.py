"""Sudoku: the forms of an action, and random play against another judge."""

import numpy as np
import pytest

from actfocus_jax.envs import sudoku

# --- Forms of an action ------------------------------------------------------

READ = {
  'place 3 at row 1 col 2': (1, 2, 3),
  'place 3 at (1,2)': (1, 2, 3),
  'place 3 at 1,2': (1, 2, 3),
  '3 at 1,2': (1, 2, 3),
  '3 at (1,2)': (1, 2, 3),
  '(1,2,3)': (1, 2, 3),
  '1,2,3': (1, 2, 3),
  # Any case, any white space.
  'place\n3  at\trow 1   col\u00a02': (1, 2, 3),
  'place 3 at ( 1 , 2 )': (1, 2, 3),
  # Anywhere.
  'I will place 3 at row 1 col 2 now': (1, 2, 3),
  'cell(1,2,3)!': (1, 2, 3),
  # Several: the form that comes first in the list, then the leftmost.
  '1,1,1 place 3 at row 1 col 2': (1, 2, 3),
  '2 at (4,4) 3 at 1,2': (1, 2, 3),
  '4,4,4 (1,2,3)': (1, 2, 3),
  '1,2,3 4,4,4': (1, 2, 3),
  '1,2,3,4': (1, 2, 3),
  '-1,2,3,4': (2, 3, 4),
  # Whole numbers only.
  '12,34,56': (12, 34, 56),
  '01,002,0003': (1, 2, 3),
  '1,2,3-4': (1, 2, 3),
}
NOT_READ = [
  '',
  '1,2',
  '(1,2),3',
  'place three at row 1 col 2',
  'place 3 at row 1, col 2',
  'place 3 at (1,2',
  # Signs, decimals.
  '+1,2,3',
  'place -3 at row 1 col 2',
  '\u22121,2,3',
  '\u20131,2,3',
  '1,2,3.5',
  '.1,2,3',
  '1,2,3.0',
  # Digits of other scripts.
  '١1,2,3',
  '1,²,3',
]


@pytest.mark.parametrize('action', READ)
def test_read_finds_the_placement(action):
  assert sudoku.read(action) == READ[action]


@pytest.mark.parametrize('action', NOT_READ)
def test_read_finds_nothing(action):
  assert sudoku.read(action) is None


def test_read_of_huge_numbers_is_out_of_range():
  for zeros in (0, 5000):
    digits = '0' * zeros + '3' * 6000
    row, col, value = sudoku.read(f'1,2,{digits}')
    assert (row, col) == (1, 2) and value > 9
  assert sudoku.read(f'1,2,{"0" * 6000}3') == (1, 2, 3)
  assert sudoku.read('1,2,1000')[2] > 9


# --- An independent judge ----------------------------------------------------


class Judge:
  """The rules restated on lists of lists, from the text of the boards."""

  def __init__(self, env, state):
    self.size, self.max_steps = env.size, env.max_steps
    self.pays_refills = env.allow_refill_reward
    self.given = self.rows(state.puzzle.given)
    self.best = self.rows(state.puzzle.solution)
    self.board = self.rows(state.puzzle.given)
    self.paid, self.steps = [], 0

  def rows(self, cells):
    size = self.size
    return [list(cells[size * r : size * r + size]) for r in range(size)]

  def breaks(self, row, col, value):
    """Return whether the board would show a number twice."""
    box = {4: 2, 9: 3}[self.size]
    for r in range(self.size):
      for c in range(self.size):
        alike = r == row or c == col
        alike |= r // box == row // box and c // box == col // box
        if alike and (r, c) != (row, col) and self.board[r][c] == value:
          return True
    return False

  def reward(self, placement):
    self.steps += 1
    if placement is None or not all(1 <= n <= self.size for n in placement):
      return -0.1
    row, col, value = placement[0] - 1, placement[1] - 1, placement[2]
    if self.given[row][col] or self.board[row][col] == value:
      return -0.1
    if self.breaks(row, col, value):
      return -0.1
    self.board[row][col] = value
    reward = 0.0
    if (row, col) not in self.paid or self.pays_refills:
      reward = 1.0 if self.best[row][col] == value else 0.5
    self.paid.append((row, col))
    return reward + 10.0 * self.is_full()

  def is_full(self):
    return all(value for row in self.board for value in row)

  def is_done(self):
    return self.is_full() or self.steps == self.max_steps

  def valid(self, row, col):
    numbers = range(1, self.size + 1)
    return [n for n in numbers if not self.breaks(row, col, n)]

  def empty(self):
    cells = np.ndindex(self.size, self.size)
    return [(r, c) for r, c in cells if not self.board[r][c]]


def random_placement(rng, judge):
  """Often what fits into an empty cell, sometimes anything."""
  size, empty = judge.size, judge.empty()
  if rng.random() < 0.4:
    return tuple(rng.integers(0, size + 2, 3).tolist())
  row, col = empty[rng.integers(len(empty))]
  if rng.random() < 0.3 and judge.paid:
    row, col = judge.paid[rng.integers(len(judge.paid))]
  valid = judge.valid(row, col)
  if rng.random() < 0.5 and judge.best[row][col] in valid:
    return row + 1, col + 1, judge.best[row][col]
  value = valid[rng.integers(len(valid))] if valid else 1
  return row + 1, col + 1, value


def write(rng, placement):
  form = str(rng.choice(sudoku.FORMS))
  row, col, value = map(str, placement)
  return form.replace('V', value).replace('R', row).replace('C', col)


@pytest.mark.parametrize(
  'size, blanks, max_steps, allow_refill_reward',
  [(4, 6, 16, False), (4, 12, 30, True), (9, 20, 40, False)],
)
def test_random_play_agrees_with_the_judge(
  size, blanks, max_steps, allow_refill_reward
):
  env = sudoku.Sudoku(
    size=size,
    blanks=blanks,
    max_steps=max_steps,
    allow_refill_reward=allow_refill_reward,
  )
  rng = np.random.default_rng(0)
  seen, solved = [], 0
  for seed in range(60 if size == 4 else 15):
    state, _ = env.reset(seed)
    judge, rewards = Judge(env, state), []
    done = False
    while not done:
      placement = random_placement(rng, judge)
      state, step = env.step(state, write(rng, placement))
      assert step.reward == pytest.approx(judge.reward(placement))
      assert judge.rows(state.cells) == judge.board
      done = step.done
      assert done == judge.is_done() and step.success == judge.is_full()
      rewards.append(step.reward)
    solved += step.success
    seen += [round(reward, 6) for reward in rewards]
    if not allow_refill_reward:
      paid = [reward for reward in rewards if reward > 0]
      assert len(paid) <= blanks
      assert sum(paid) <= blanks + 10.0 * step.success
  assert {-0.1, 0.5, 1.0} <= set(seen)
  if size == 4:  # a large board rarely has another number that fits
    assert (0.0 in seen) != allow_refill_reward
  assert solved > 0 or blanks == 20
