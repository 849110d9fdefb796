"""Sudoku: text, forms of an action, rewards, and that nothing can be farmed."""

import copy
import dataclasses
import time

import numpy as np
import pytest

from actfocus_jax.envs import base, sudoku

BOARD = '1200 3410 2143 4321'
# The four empty cells can be 2 4 and 4 2, as stored, or 4 2 and 2 4.
TWO_WAYS = '1234 3412 0103 0301/1234 3412 2143 4321'
RULE = '=' * 50
TEXT = f"""\
{RULE}
Sudoku 4x4
{RULE}
[1][2]|  .  .
[3][4]| [1] .
--------------
[2][1]| [4][3]
[4][3]| [2][1]
Legend: [v] given, v placed, . empty
Valid numbers of the empty cells:
  - (1,3): [3]
  - (1,4): [4]
  - (2,4): [2]
Progress: 13/16 cells filled (13 initial, 0 placed)
Steps: 0/16"""


def play(board, actions, **options):
  """Rewards of the actions, and the last state and step."""
  env = sudoku.Sudoku(**options)
  state, _ = env.load(board)
  rewards = []
  for action in actions:
    state, step = env.step(state, action)
    rewards.append(step.reward)
  return rewards, state, step


# --- Text --------------------------------------------------------------------


def test_text_at_the_start():
  assert sudoku.Sudoku().load(BOARD)[1] == TEXT


def test_text_after_a_move():
  _, _, step = play(BOARD, ['hello', '1,3,3'])
  assert step.text == TEXT.replace('|  .  .', '|  3  .').replace(
    '\n  - (1,3): [3]', ''
  ).replace('Valid', 'Last move: 3 placed at (1,3).\nValid').replace(
    '13/16 cells filled (13 initial, 0 ', '14/16 cells filled (13 initial, 1 '
  ).replace('Steps: 0', 'Steps: 2')


def test_text_of_a_solved_board():
  _, _, step = play(BOARD, ['1,3,3', '1,4,4', '2,4,2'])
  assert step.text == (
    f'{RULE}\nSudoku 4x4\n{RULE}\n'
    '[1][2]|  3  4\n[3][4]| [1] 2\n--------------\n'
    '[2][1]| [4][3]\n[4][3]| [2][1]\n'
    'Legend: [v] given, v placed, . empty\n'
    'Last move: 2 placed at (2,4).\n'
    'Progress: 16/16 cells filled (13 initial, 3 placed)\n'
    'Steps: 3/16'
  )


def test_text_of_a_large_board():
  env = sudoku.Sudoku(size=9, blanks=20, max_steps=30)
  lines = env.load('123456789' + '0' * 72)[1].split('\n')
  assert lines[1] == 'Sudoku 9x9'
  assert lines[3] == '[1][2][3]| [4][5][6]| [7][8][9]'
  assert lines[4] == ' .  .  . |  .  .  . |  .  .  .'
  assert [i for i, line in enumerate(lines) if line == '-' * 31] == [6, 10]
  assert lines[14:] == [
    'Legend: [v] given, v placed, . empty',
    'Progress: 9/81 cells filled (9 initial, 0 placed)',
    'Steps: 0/30',
  ]


@pytest.mark.parametrize('blanks, listed', [(9, 9), (10, 10), (11, 0)])
def test_valid_numbers_are_listed_for_few_empty_cells(blanks, listed):
  env = sudoku.Sudoku(blanks=blanks)
  text = env.reset(0)[1]
  assert text.count('  - (') == listed
  assert ('Valid numbers' in text) == (listed > 0)
  assert env.load('1' + '0' * 15)[1].count('  - (') == 0


def test_several_valid_numbers_are_a_list():
  text = sudoku.Sudoku().load('1200 3400 0000 0000')[1]
  assert 'Valid' not in text
  text = sudoku.Sudoku().load('1230 3400 2143 4000')[1]
  assert '  - (1,4): [4]\n' in text and '  - (2,4): [1, 2]\n' in text
  # A number that fits may leave another cell without any.
  _, _, step = play(TWO_WAYS, ['3,1,2', '4,3,4'])
  assert '  - (3,3): []\n  - (4,1): []\n' in step.text


def test_no_line_ends_with_a_blank():
  env = sudoku.Sudoku()
  for seed in range(50):
    text = env.reset(seed)[1]
    assert text == '\n'.join(line.rstrip() for line in text.split('\n'))


def test_evaluation_boards_stay_the_same():
  # A change here changes what success on the evaluation seeds means.
  lines = sudoku.Sudoku().reset(123)[1].split('\n')
  assert lines[3:8] == [
    '[3] . |  . [4]',
    '[4] . | [3][1]',
    '--------------',
    ' .  . | [4] .',
    '[2][4]| [1][3]',
  ]


def test_instructions():
  text = sudoku.Sudoku().instructions
  assert '4x4' in text and '2x2' in text and 'gives nothing' in text
  assert '9x9' in sudoku.Sudoku(size=9).instructions
  assert '3x3' in sudoku.Sudoku(size=9).instructions
  paid = sudoku.Sudoku(allow_refill_reward=True).instructions
  assert 'gives the same' in paid and 'nothing' not in paid
  assert sudoku.Sudoku(instructions='Play.').instructions == 'Play.'
  # What it says of actions is true.
  *_, last = text.split('\n')
  for example in ('2,3,1', 'place 1 at row 2 col 3'):
    assert example in last and sudoku.read(example) == (2, 3, 1)


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
  'PLACE 3 AT ROW 1 COL 2': (1, 2, 3),
  'Place 3 At (1,2)': (1, 2, 3),
  'place\n3  at\trow 1   col\u00a02': (1, 2, 3),
  'place 3 at ( 1 , 2 )': (1, 2, 3),
  '3 at 1 ,2': (1, 2, 3),
  ' ( 1 ,2 , 3 ) ': (1, 2, 3),
  '1, 2, 3': (1, 2, 3),
  # Anywhere.
  'I will place 3 at row 1 col 2 now': (1, 2, 3),
  'fill:1,2,3.': (1, 2, 3),
  'cell(1,2,3)!': (1, 2, 3),
  '- 1,2,3': (1, 2, 3),
  'x1,2,3y': (1, 2, 3),
  # Several: the form that comes first in the list, then the leftmost.
  '1,1,1 place 3 at row 1 col 2': (1, 2, 3),
  '2 at 4,4 place 3 at (1,2)': (1, 2, 3),
  '1,2,3 4,4,4': (1, 2, 3),
  '1,2,3,4': (1, 2, 3),
  '-1,2,3,4': (2, 3, 4),
  # Whole numbers only.
  '12,34,56': (12, 34, 56),
  '13 at 1,2': (1, 2, 13),
  '01,002,0003': (1, 2, 3),
  '0,0,0': (0, 0, 0),
  '1,2,3.': (1, 2, 3),
  '1,2,3-4': (1, 2, 3),
}
NOT_READ = [
  '',
  ' ',
  'place',
  '1,2',
  '1;2;3',
  '1 2 3',
  '(1,2),3',
  'place three at row 1 col 2',
  'place 3 at row 1',
  'place 3 at row 1, col 2',
  'place3 at row 1 col 2',
  'place 3 at row1 col 2',
  'place 3 at (1,2',
  '3at 1,2',
  '3 at1,2',
  # Signs, decimals.
  '-1,2,3',
  '1,-2,3',
  '1,2,-3',
  '+1,2,3',
  '1,+2,3',
  '(1,2,-3)',
  '(-1,2,3)',
  'place -3 at row 1 col 2',
  'place 3 at row -1 col 2',
  'place 3 at row 1 col -2',
  '-3 at 1,2',
  '3 at -1,2',
  '3 at (1,-2)',
  '\u22121,2,3',
  '\u20131,2,3',
  '1.5,2,3',
  '1,2.5,3',
  '1,2,3.5',
  '.1,2,3',
  '1,2,3.0',
  # Digits of other scripts, alone or beside ours.
  '١,٢,٣',
  '１,２,３',
  '١1,2,3',
  '1,2,3١',
  '1,²,3',
]


@pytest.mark.parametrize('action', READ)
def test_what_is_read(action):
  assert sudoku.read(action) == READ[action]
  assert scan(action) == READ[action]


@pytest.mark.parametrize('action', NOT_READ)
def test_what_is_not_read(action):
  assert sudoku.read(action) is None
  assert scan(action) is None


def test_huge_numbers_are_out_of_range():
  for zeros in (0, 5000):
    digits = '0' * zeros + '3' * 6000
    row, col, value = sudoku.read(f'1,2,{digits}')
    assert (row, col) == (1, 2) and value > 9
  assert sudoku.read(f'1,2,{"0" * 6000}3') == (1, 2, 3)
  assert sudoku.read('1,2,1000')[2] > 9


@pytest.mark.parametrize(
  'piece',
  ['1', ' ', '(', ',', '1,', '1 ,', '1 at ', 'place ', 'place 1 at ', '1, ']
  + ['place 1 at row 1 ', '3 at (1', '-', '.1', '1 at 1 ', '( 1 ,'],
)
def test_long_strings_are_judged_in_linear_time(piece):
  start = time.process_time()
  for begin in ('', '1', '1,', '1 at'):
    sudoku.read(begin + piece * (200_000 // len(piece)))
  assert time.process_time() - start < 5.0


def scan(text):
  """The forms restated without regular expressions: (row, col, number)."""
  for form in (
    ['place', ' ', 'V', ' ', 'at', ' ', 'row', ' ', 'R', ' ', 'col', ' ', 'C'],
    ['place', ' ', 'V', ' ', 'at', ' ', '(', '?', 'R', '?', ',', '?', 'C']
    + ['?', ')'],
    ['place', ' ', 'V', ' ', 'at', ' ', 'R', '?', ',', '?', 'C'],
    ['V', ' ', 'at', ' ', 'R', '?', ',', '?', 'C'],
    ['V', ' ', 'at', ' ', '(', '?', 'R', '?', ',', '?', 'C', '?', ')'],
    ['(', '?', 'R', '?', ',', '?', 'C', '?', ',', '?', 'V', '?', ')'],
    ['R', '?', ',', '?', 'C', '?', ',', '?', 'V'],
  ):
    for start in range(len(text)):
      found = scan_form(text, start, form)
      if found:
        return found['R'], found['C'], found['V']
  return None


def scan_form(text, here, form):
  found = {}
  for part in form:
    begin = here
    if part in 'RCV':
      while text[here : here + 1] in tuple('0123456789'):
        here += 1
      around = text[max(begin - 1, 0) : begin], text[here : here + 2]
      if here == begin or not stands_alone(*around):
        return None
      found[part] = int(text[begin:here])
    elif part in ' ?':
      while text[here : here + 1].isspace():
        here += 1
      if part == ' ' and here == begin:
        return None
    elif text[here : here + len(part)].lower() == part:
      here += len(part)
    else:
      return None
  return found


def stands_alone(before, after):
  if before.isdecimal() or before in ('+', '-', '.', '\u2212', '\u2013'):
    return False
  return not (
    after[:1].isdecimal() or (after[:1] == '.' and after[1:].isdecimal())
  )


# --- Rewards -----------------------------------------------------------------

RANGE = 'Invalid: row, column and number go from 1 to 4.'
# name: (actions, rewards, feedback on the last) on TWO_WAYS
GOLDEN = {
  'as stored': (['3,1,2'], [1.0], '2 placed at (3,1).'),
  'not as stored': (['3,1,4'], [0.5], '4 placed at (3,1).'),
  'unreadable': (['three'], [-0.1], 'Invalid: no placement found.'),
  'row 0': (['0,1,2'], [-0.1], RANGE),
  'row 5': (['5,1,2'], [-0.1], RANGE),
  'column 0': (['3,0,2'], [-0.1], RANGE),
  'column 5': (['3,5,2'], [-0.1], RANGE),
  'number 0': (['3,1,0'], [-0.1], RANGE),
  'number 5': (['3,1,5'], [-0.1], RANGE),
  'number 0 in an own cell': (['3,1,2', '3,1,0'], [1.0, -0.1], RANGE),
  'given': (['3,2,1'], [-0.1], 'Invalid: (3,2) is given.'),
  'given, other': (['3,2,4'], [-0.1], 'Invalid: (3,2) is given.'),
  'conflict in the row': (
    ['3,1,1'],
    [-0.1],
    'Invalid: the row of (3,1) has a 1.',
  ),
  'conflict with an own one': (
    ['3,1,4', '4,1,4'],
    [0.5, -0.1],
    'Invalid: the column of (4,1) has a 4.',
  ),
  'same number': (['3,1,2'] * 2, [1.0, -0.1], 'Invalid: (3,1) is 2 already.'),
  'other number': (['3,1,4', '3,1,2'], [0.5, 0.0], '2 placed at (3,1).'),
  'there and back': (
    ['3,1,2', '3,1,4', '3,1,2', '3,1,4'],
    [1.0, 0.0, 0.0, 0.0],
    '4 placed at (3,1).',
  ),
  'solved as stored': (
    ['3,1,2', '3,3,4', '4,1,4', '4,3,2'],
    [1.0, 1.0, 1.0, 11.0],
    '2 placed at (4,3).',
  ),
  'solved otherwise': (
    ['3,1,4', '3,3,2', '4,1,2', '4,3,4'],
    [0.5, 0.5, 0.5, 10.5],
    '4 placed at (4,3).',
  ),
  'solved after a change': (
    ['3,1,4', '3,1,2', '4,1,4', '3,3,4', '4,3,2'],
    [0.5, 0.0, 1.0, 1.0, 11.0],
    '2 placed at (4,3).',
  ),
}


@pytest.mark.parametrize('name', GOLDEN)
def test_golden(name):
  actions, expected, feedback = GOLDEN[name]
  rewards, state, step = play(TWO_WAYS, actions)
  assert rewards == pytest.approx(expected)
  assert state.feedback == feedback
  assert f'\nLast move: {feedback}\n' in step.text
  assert state.steps == len(actions)
  assert step.success == step.done == (expected[-1] > 9)
  assert step.info['effective'] == (expected[-1] != -0.1)


@pytest.mark.parametrize(
  'board, action, unit',
  [
    ('1000 0000 0000 0000', '1,4,1', 'row'),
    ('1000 0000 0000 0000', '4,1,1', 'column'),
    ('1000 0000 0000 0000', '2,2,1', 'box'),
  ],
)
def test_each_kind_of_conflict(board, action, unit):
  rewards, state, _ = play(board, [action])
  assert rewards == [-0.1] and f'the {unit} of' in state.feedback


def test_refills_are_paid_where_it_is_allowed():
  actions = ['3,1,4', '3,1,2', '3,1,4', '3,1,4', '3,1,1']
  rewards, *_ = play(TWO_WAYS, actions, allow_refill_reward=True)
  assert rewards == pytest.approx([0.5, 1.0, 0.5, -0.1, -0.1])
  rewards, *_ = play(TWO_WAYS, actions)
  assert rewards == pytest.approx([0.5, 0.0, 0.0, -0.1, -0.1])


def test_info_counts_own_cells():
  infos = []
  env = sudoku.Sudoku()
  state, _ = env.load(TWO_WAYS)
  for action in ('3,1,4', '3,3,2', 'x', '4,1,2', '3,1,4'):
    state, step = env.step(state, action)
    infos.append((step.info['cells_placed'], step.info['cells_correct']))
  assert infos == [(1, 0), (2, 0), (2, 0), (3, 0), (3, 0)]
  _, _, step = play(TWO_WAYS, ['3,1,2', '4,3,4'])
  assert step.info == {
    'effective': True,
    'cells_placed': 2,
    'cells_correct': 1,
  }


@pytest.mark.parametrize('actions', [['x'] * 3, ['3,1,2', '3,1,4', '1,1,1']])
def test_an_episode_ends_after_its_steps(actions):
  _, state, step = play(TWO_WAYS, actions[:2], max_steps=3)
  assert not step.done
  _, state, step = play(TWO_WAYS, actions, max_steps=3)
  assert step.done and not step.success and state.steps == 3
  assert step.text.endswith('Steps: 3/3')


def test_the_last_step_may_solve():
  actions = ['3,1,2', '3,3,4', '4,1,4', '4,3,2']
  rewards, _, step = play(TWO_WAYS, actions, max_steps=4)
  assert rewards[-1] == 11.0 and step.done and step.success


@pytest.mark.parametrize(
  'actions, success', [(['3,1,4', 'x'], False), (['3,1,2', '4,1,4'], True)]
)
def test_done_states_stay(actions, success):
  board = TWO_WAYS.replace('0103 0301', '0143 0321')
  env = sudoku.Sudoku(max_steps=2)
  state, _ = env.load(board)
  for action in actions:
    state, _ = env.step(state, action)
  for action in ('3,1,2', '3,1,4', 'x'):
    following, step = env.step(state, action)
    assert following == state and step.text == env.render(state)
    assert (step.reward, step.done, step.success) == (0.0, True, success)
    assert step.info['effective'] is False


def test_a_full_board_is_solved_from_the_start():
  rewards, _, step = play('1234 3412 2143 4321', ['1,1,1'])
  assert rewards == [0.0] and step.done and step.success


def test_a_turn_without_a_form_costs_no_format_penalty():
  env = sudoku.Sudoku()
  state, _ = env.load(TWO_WAYS)
  state, turn = base.play_turn(
    env, state, '', ['nonsense', '3,1,2', '3,3,4'], budget=16, max_actions=2
  )
  assert turn.reward == pytest.approx(0.9) and turn.penalty == 0.0
  assert (turn.actions_used, turn.valid, turn.effective) == (2, True, 1)


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
    """Whether the board would show a number twice."""
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

  def check_text(self, text):
    """Compares the cells, the valid numbers and the counts."""
    lines = text.split('\n')
    cells = [
      line.replace('|', ' ') for line in lines[3:] if '-----' not in line
    ]
    for row in range(self.size):
      # Every number or dot with what is around it.
      shown = cells[row].replace(']', '] ').replace('[', ' [').split()
      for col, symbol in enumerate(shown):
        value = self.board[row][col] or '.'
        is_given = self.given[row][col]
        assert symbol == (f'[{value}]' if is_given else f'{value}')
      assert len(shown) == self.size
    empty = self.empty()
    expected = [f'  - ({r + 1},{c + 1}): {self.valid(r, c)}' for r, c in empty]
    listed = [line for line in lines if line.startswith('  - ')]
    assert listed == (expected if len(empty) <= 10 else [])
    total, first = self.size**2, sum(map(bool, sum(self.given, [])))
    assert lines[-2:] == [
      f'Progress: {total - len(empty)}/{total} cells filled '
      f'({first} initial, {total - len(empty) - first} placed)',
      f'Steps: {self.steps}/{self.max_steps}',
    ]


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


@pytest.mark.parametrize('allow_refill_reward', [False, True])
@pytest.mark.parametrize(
  'size, blanks, max_steps', [(4, 6, 16), (4, 12, 30), (9, 8, 16), (9, 20, 40)]
)
def test_random_play_is_judged_alike(
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
    state, text = env.reset(seed)
    judge, rewards = Judge(env, state), []
    judge.check_text(text)
    done = False
    while not done:
      placement = random_placement(rng, judge)
      state, step = env.step(state, write(rng, placement))
      assert step.reward == pytest.approx(judge.reward(placement))
      assert judge.rows(state.cells) == judge.board
      done = step.done
      assert done == judge.is_done() and step.success == judge.is_full()
      judge.check_text(step.text)
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


# --- Any string --------------------------------------------------------------

PIECES = (
  *('place', 'PLACE', ' at ', ' row ', ' col ', 'at', 'row', 'col', 'x', ' '),
  *('(', ')', ',', ', ', '  ', '\n', '.', '-', '+', '\u2212', '٣', '²', '||'),
  *'012345',
  *('10', '99', '1' * 30, '\ud800', '\x00', '</answer>', '1,2,3', '2 at 1,3'),
)


def fuzzed(rng, judge):
  """Random bytes, random pieces, or mutated forms of what may fit."""
  kind = rng.integers(4)
  if kind == 0:
    return rng.bytes(rng.integers(0, 40)).decode('utf-8', 'surrogateescape')
  if kind == 1:
    return ''.join(rng.choice(PIECES, rng.integers(0, 12)))
  letters = list(write(rng, random_placement(rng, judge)))
  for _ in range(rng.integers(0, 3 if kind == 2 else 6)):
    at = rng.integers(len(letters) + 1)
    letters[at : at + rng.integers(0, 2)] = [str(rng.choice(PIECES))]
  return ''.join(letters)


def capped(placement):
  """What is out of range is read as any number that is."""
  return placement and tuple(min(number, 10) for number in placement)


def check_strings(count, seed):
  env = sudoku.Sudoku(max_steps=40)
  rng = np.random.default_rng(seed)
  done, boards, unread, read, valid = True, 0, 0, 0, 0
  for _ in range(count):
    if done:
      state, _ = env.reset(boards)
      judge, boards = Judge(env, state), boards + 1
    action = fuzzed(rng, judge)
    placement = scan(action)
    assert capped(sudoku.read(action)) == capped(placement), repr(action)
    before = copy.copy(state)
    following, step = env.step(state, action)
    assert state == before and (following, step) == env.step(state, action)
    assert step.reward == pytest.approx(judge.reward(placement))
    assert following.steps == state.steps + 1
    if step.reward < 0:
      assert following.cells == state.cells and not step.info['effective']
    if placement is None:
      assert step.reward == -0.1
    step.text.encode()  # nothing of what was written comes back
    unread, read = unread + (placement is None), read + (placement is not None)
    valid += step.info['effective']
    state, done = following, step.done
  assert min(unread, read) > count / 5 and valid > count / 50


def test_any_string_is_judged():
  check_strings(20_000, seed=0)


@pytest.mark.slow
def test_any_of_many_strings_is_judged():
  check_strings(100_000, seed=1)


def test_words_of_an_action_do_not_come_back():
  for action in ('Well done, you won! 77,1,2', '<|im_end|> 1,1,1', 'a' * 10**6):
    _, _, step = play(BOARD, [action])
    for word in ('won', 'im_end', '77', 'aaa'):
      assert word not in step.text


# --- Purity, seeds, fields ---------------------------------------------------


def test_equal_arguments_give_equal_results():
  for seed in (0, 1, 123, 10_000):
    env, twin = sudoku.Sudoku(), sudoku.Sudoku()
    state, text = env.reset(seed)
    assert (state, text) == twin.reset(seed)
    assert text == env.render(state)
    for action in ('1,1,1', '1,2,3', '4,4,4', '(3,3,2)', '2 at 2,2', 'x'):
      before = copy.deepcopy(state)
      following, step = env.step(state, action)
      assert state == before and hash(state) == hash(before)
      assert (following, step) == twin.step(before, action)
      assert hash(following) == hash(twin.step(before, action)[0])
      assert step.text == env.render(following)
      with pytest.raises(dataclasses.FrozenInstanceError):
        state.steps = 7
      state = following


def test_seeds_give_different_boards():
  env = sudoku.Sudoku()
  assert len({env.reset(seed)[1] for seed in range(200)}) > 195


def test_step_types():
  env = sudoku.Sudoku()
  state, _ = env.load(BOARD)
  for action in ('1,3,3', '1,3,1', 'x'):
    _, step = env.step(state, action)
    assert type(step.text) is str and type(step.reward) is float
    assert type(step.done) is bool and type(step.success) is bool
    assert type(step.info['effective']) is bool
    assert {type(value) for value in step.info.values()} == {bool, int}


@pytest.mark.parametrize(
  'board', ['', '123', BOARD + '0', '1' * 16, BOARD + '/' + BOARD, '0' * 81]
)
def test_bad_boards_raise(board):
  with pytest.raises(ValueError, match='board'):
    sudoku.Sudoku().load(board)


def test_a_loaded_board_goes_on_like_a_generated_one():
  env = sudoku.Sudoku()
  for seed in range(20):
    state, text = env.reset(seed)
    board = '/'.join(
      ''.join(map(str, cells))
      for cells in (state.puzzle.given, state.puzzle.solution)
    )
    assert env.load(board) == (state, text)


@pytest.mark.parametrize(
  'field, wrong',
  [
    ('size', 3),
    ('size', 16),
    ('blanks', 0),
    ('blanks', 17),
    ('max_steps', 0),
  ],
)
def test_wrong_fields_raise(field, wrong):
  with pytest.raises(ValueError, match=f'^{field} must be .*got {wrong}$'):
    sudoku.Sudoku(**{field: wrong})
  assert sudoku.Sudoku(size=9, blanks=17).reset(0)
