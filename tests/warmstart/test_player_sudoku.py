"""The scripted Sudoku player: what it reads, plays, and how often it wins."""

import numpy as np
import pytest

from actfocus_jax.envs import sudoku
from actfocus_jax.warmstart import players
from actfocus_jax.warmstart.players import sudoku as sudoku_player

TWO_WAYS = '1234 3412 0103 0301/1234 3412 2143 4321'
TURNS = dict(turns=8, max_actions=2, budget=16)


def answer(board, moves=(), seed=0, **options):
  """What a player says to a board after some moves."""
  env = sudoku.Sudoku()
  state, _ = env.load(board)
  for move in moves:
    state, _ = env.step(state, move)
  player = sudoku_player.SudokuCareless(**options)
  return player.respond(env, state, np.random.default_rng(seed))


# name: (board, moves before, thought, actions of skill 1)
GOLDEN = {
  'two with one valid number': (
    '1200 3412 2143 4320',
    [],
    'Empty (1,3): [3], (1,4): [4].',
    ['1,3,3', '1,4,4'],
  ),
  'the last one': (
    '1234 3412 2143 4320',
    [],
    'Empty (4,4): [1].',
    ['4,4,1'],
  ),
  'no second one that needs the first': (
    '4000 2004 3421 1240/4132 2314 3421 1243',
    [],
    'Empty (4,4): [3].',
    ['4,4,3'],
  ),
  'one with several': (TWO_WAYS, [], 'Empty (3,1): [2, 4].', ['3,1,2']),
  'fewest of several': (
    '0001 0104 0013 1342/3421 2134 4213 1342',
    [],
    'Empty (1,2): [2, 4].',
    ['1,2,4'],
  ),
  'not as stored': (
    TWO_WAYS,
    ['3,1,4'],
    'Empty (3,3): [2], (4,1): [2].',
    ['3,3,2', '4,1,2'],
  ),
  'fewest before first': (
    '1000 3410 2143 4321',
    [],
    'Empty (1,2): [2], (1,3): [3].',
    ['1,2,2', '1,3,3'],
  ),
}


@pytest.mark.parametrize('name', GOLDEN)
def test_golden(name):
  board, moves, thought, actions = GOLDEN[name]
  assert answer(board, moves, skill=1.0) == (thought, actions)
  assert answer(board, moves, skill=0.0)[0] == thought
  assert answer(board, moves, skill=1.0, length=1)[1] == actions[:1]


def test_the_orderly_player_takes_the_first_cell_of_the_list():
  env = sudoku.Sudoku()
  state, text = env.load('0001 0104 0013 1342/3421 2134 4213 1342')
  player = sudoku_player.SudokuOrderly(skill=1.0)
  rng = np.random.default_rng(0)
  thought, actions = player.respond(env, state, rng)
  assert (thought, actions) == ('Empty (1,1): [2, 3, 4].', ['1,1,3'])
  assert '  - (1,1): [2, 3, 4]\n' in text
  # It does not look ahead: a cell that nothing fits into is met in its turn.
  stuck, _ = env.load(TWO_WAYS)
  for move in ('3,1,2', '4,3,4'):
    stuck, _ = env.step(stuck, move)
  thought, _ = player.respond(env, stuck, rng)
  assert thought.startswith('Nothing fits into (3,3), so I change')


def test_no_second_cell_that_nothing_fits_into():
  player = sudoku_player.SudokuOrderly(length=2, skill=0.4, habit=0.4)
  env = sudoku.Sudoku(blanks=12)
  players.success_rate(env, player, range(60), turns=12, budget=24)


def test_a_number_is_changed_where_nothing_fits():
  stuck = ['3,1,2', '4,3,4']  # (3,3) and (4,1) have no valid number now
  answers = {
    (thought, *actions)
    for thought, actions in (
      answer(TWO_WAYS, stuck, seed, skill=1.0) for seed in range(20)
    )
  }
  assert answers == {
    ('Nothing fits into (3,3), so I change (3,1).', '3,1,2'),
    ('Nothing fits into (3,3), so I change (4,3).', '4,3,2'),
  }
  # Where the stored number fits no more, the first that does is played.
  assert answer(TWO_WAYS, ['3,1,4'], skill=1.0)[1][0] == '3,3,2'


def shares(**options):
  """How often the player plays each number where 4 is the only valid one."""
  board = '1230 3412 2143 4321'
  answers = [
    answer(board, seed=seed, length=1, **options)[1] for seed in range(2000)
  ]
  return [answers.count([f'1,4,{value}']) / 2000 for value in range(1, 5)]


@pytest.mark.parametrize(
  'skill, habit', [(0.0, 0.0), (0.4, 0.0), (1.0, 0.0), (0.3, 0.4), (0.0, 1.0)]
)
def test_skill_and_habit_are_chances(skill, habit):
  rest = (1 - skill - habit) / 4
  expected = np.array([habit + rest, rest, rest, skill + rest])
  error = np.sqrt(expected * (1 - expected) / 2000)
  found = np.array(shares(skill=skill, habit=habit))
  assert np.all(np.abs(found - expected) <= 3.5 * error)


@pytest.mark.parametrize('size, blanks', [(4, 6), (4, 9), (9, 10)])
def test_answers_are_copied_from_the_text(size, blanks):
  env = sudoku.Sudoku(size=size, blanks=blanks)
  player = sudoku_player.SudokuCareless(skill=0.5)
  lengths = []
  for seed in range(40):
    state, text = env.reset(seed)
    rng = np.random.default_rng(seed)
    for _ in range(6):
      before = rng.bit_generator.state
      thought, actions = player.respond(env, state, rng)
      rng.bit_generator.state = before
      assert (thought, actions) == player.respond(env, state, rng)
      assert 1 <= len(actions) <= 2 and len(thought.split()) <= 25
      lengths.append(len(actions))
      if thought.startswith('Empty'):
        lines = [line.removeprefix('  - ') for line in text.split('\n')]
        named = thought.removeprefix('Empty ').removesuffix('.')
        named = named.replace('], (', ']\n(').split('\n')
        assert set(named) <= set(lines) and len(named) == len(actions)
      for action in actions:
        # A cell that the thought names, a number in range, an empty or own one.
        row, col, value = map(int, action.split(','))
        assert sudoku.read(action) == (row, col, value)
        assert f'({row},{col})' in thought and 1 <= value <= size
        assert not state.puzzle.given[(row - 1) * size + col - 1]
        state, step = env.step(state, action)
      text = step.text
      if step.done:
        break
  assert set(lengths) == {1, 2}


@pytest.mark.parametrize('blanks', [1, 6, 8, 9])
def test_skill_one_solves_every_board(blanks):
  env = sudoku.Sudoku(blanks=blanks)
  player = sudoku_player.SudokuCareless(skill=1.0)
  assert players.success_rate(env, player, range(300), **TURNS) == 1.0


def test_the_default_is_careless():
  player = sudoku_player.SudokuCareless()
  assert (player.skill, player.length, player.habit) == (0.12, 2, 0.0)


# Measured on seeds 0..1999 with 8 turns of 2 actions.
@pytest.mark.parametrize(
  'options, expected', [({}, 0.362), (dict(skill=0.0), 0.142)]
)
def test_success(options, expected):
  player = sudoku_player.SudokuCareless(**options)
  rate = players.success_rate(
    sudoku.Sudoku(), player, range(10_000, 10_500), **TURNS
  )
  # Two samples: 500 episodes here, 2,000 there.
  error = np.sqrt(expected * (1 - expected) * (1 / 500 + 1 / 2000))
  assert abs(rate - expected) < 3 * error
