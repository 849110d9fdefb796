"""FrozenLake: text, ice, and how hard the boards are."""

import numpy as np
import pytest

from actfocus_jax.envs import frozen_lake

# gymnasium's numbering: action a slips to a - 1 and a + 1 modulo 4.
OFFSETS = ((0, -1), (1, 0), (0, 1), (-1, 0))
NAMES = ('Left', 'Down', 'Right', 'Up')


def firm():
  return frozen_lake.FrozenLake(success_probability=1.0)


BOARD = 'FHS\nHFG'
TEXT = """\
Coordinates:
Board size: 2 rows x 3 cols (zero-indexed).
Start: (0, 2)
Goal: (1, 2)
Player{}
Holes: (0, 1), (1, 0)
Grid Map:
{}"""


@pytest.mark.parametrize(
  ('action', 'place', 'grid', 'ends'),
  [
    ('Up', ': (0, 2)', '_OP\nO_G', (0.0, False, False)),
    ('Left', ' in hole: (0, 1)', '_X_\nO_G', (0.0, True, False)),
    ('Down', ' on goal: (1, 2)', '_O_\nO_√', (1.0, True, True)),
  ],
)
def test_text_and_reward_by_hand(action, place, grid, ends):
  env = firm()
  _, step = env.step(env.load(BOARD)[0], action)
  assert step.text == TEXT.format(place, grid)
  assert (step.reward, step.done, step.success) == ends


@pytest.mark.parametrize('board', ['SG', 'SHG'])
def test_done_states_stay(board):
  env = firm()
  state, first = env.step(env.load(board)[0], 'Right')
  following, step = env.step(state, 'Left')
  assert following.player == state.player
  assert (step.reward, step.done, step.success) == (0.0, True, first.success)


def outcome_table(board, probability):
  """{(cell, action): {cell: probability}}, restated with arrays."""
  rows, cols = board.shape
  table = {}
  for row, col in np.ndindex(rows, cols):
    for action in range(4):
      outcome = np.zeros((rows, cols))
      for turn, share in ((-1, 0.5), (0, None), (1, 0.5)):
        p = probability if share is None else share * (1 - probability)
        move = OFFSETS[(action + turn) % 4]
        r = np.clip(row + move[0], 0, rows - 1)
        c = np.clip(col + move[1], 0, cols - 1)
        outcome[r, c] += p
      table[(row, col), NAMES[action]] = outcome
  return table


def as_letters(state):
  lake = state.lake
  board = np.full((lake.rows, lake.cols), 'F')
  for cell in lake.holes:
    board[cell] = 'H'
  board[lake.start], board[lake.goal] = 'S', 'G'
  return board


def outcomes(env, state, cell, action):
  moved = frozen_lake.State(state.lake, cell, state.seed, 0)
  dense = np.zeros((state.lake.rows, state.lake.cols))
  for probability, following in env.transitions(moved, action):
    dense[following] += probability
  return dense


@pytest.mark.parametrize('probability', [1.0, 0.8, 1 / 3])
@pytest.mark.parametrize('size', [4, (3, 5)])
def test_transitions_match_an_independent_table(probability, size):
  env = frozen_lake.FrozenLake(size=size, success_probability=probability)
  state, _ = env.reset(0)
  for (cell, action), dense in outcome_table(
    as_letters(state), probability
  ).items():
    np.testing.assert_allclose(
      outcomes(env, state, cell, action), dense, atol=1e-12
    )


def turns_of_ice(env, seed, actions):
  """Turn of each action on a wide lake: -1, 0 or 1."""
  side = 2 * len(actions) + 3
  rows = ['F' * side for _ in range(side)]
  rows[0] = 'G' + rows[0][1:]
  middle = side // 2
  rows[middle] = 'F' * middle + 'S' + 'F' * middle
  state, _ = env.load('\n'.join(rows), seed=seed)
  turns = []
  for action in actions:
    following, _ = env.step(state, action)
    moved = tuple(np.subtract(following.player, state.player))
    turn = (OFFSETS.index(moved) - NAMES.index(action) + 1) % 4 - 1
    turns.append(turn)
    state = following
  return turns


def test_members_of_a_group_meet_the_same_ice():
  env = frozen_lake.FrozenLake(success_probability=1 / 3)
  member = turns_of_ice(env, 11, ['Left'] * 20)
  other = turns_of_ice(env, 11, ['Up', 'Right', 'Down', 'Down'] * 5)
  assert set(member) == {-1, 0, 1}
  assert member == other
  assert member != turns_of_ice(env, 12, ['Left'] * 20)


def test_ice_is_independent_of_the_board():
  # One stream for both would turn the first action on every board that has its
  # first tile, drawn first, a hole.
  env = frozen_lake.FrozenLake()
  intended = []
  for seed in range(1500):
    if (0, 0) in env.reset(seed)[0].lake.holes:
      intended.append(turns_of_ice(env, seed, ['Down'])[0] == 0)
  error = np.sqrt(0.8 * 0.2 / len(intended))
  assert len(intended) > 50
  assert abs(np.mean(intended) - 0.8) < 3 * error


def value(board, probability, best, steps=10):
  """Chance of the goal within `steps`: of the best, or of uniform play."""
  table = outcome_table(board, probability)
  value = (board == 'G').astype(float)
  for _ in range(steps):
    following = value.copy()
    for cell in zip(*np.nonzero(np.isin(board, ['S', 'F'])), strict=True):
      cell = tuple(map(int, cell))
      chances = [np.sum(table[cell, name] * value) for name in NAMES]
      following[cell] = max(chances) if best else np.mean(chances)
    value = following
  return value[board == 'S'].item()


@pytest.mark.parametrize(
  'probability, best, expected', [(1 / 3, True, 0.551), (0.8, False, 0.243)]
)
def test_difficulty_is_that_of_the_reference(probability, best, expected):
  env = frozen_lake.FrozenLake()
  values = [
    value(as_letters(env.reset(seed)[0]), probability, best)
    for seed in range(123, 223)
  ]
  error = np.std(values) / np.sqrt(len(values))
  assert abs(np.mean(values) - expected) < 3 * error + 0.0005


def test_generated_lakes_have_a_way_and_enough_holes():
  env = frozen_lake.FrozenLake(size=(4, 6), frozen_probability=0.7)
  states = [env.reset(seed)[0] for seed in range(200)]
  for state in states:
    lake = state.lake
    assert (lake.rows, lake.cols) == (4, 6)
    assert lake.start != lake.goal and state.player == lake.start
    assert not {lake.start, lake.goal} & lake.holes
    assert walk(state, frozen_lake.shortest_path(state)) == lake.goal
  # 22 tiles besides the ends; redrawing takes away some of the holes.
  share = np.mean([len(state.lake.holes) for state in states]) / 22
  assert 0.2 < share < 0.3
  assert (
    not frozen_lake.FrozenLake(frozen_probability=1.0).reset(0)[0].lake.holes
  )


def walk(state, path):
  cell = state.player
  for action in path:
    cell = tuple(np.add(cell, OFFSETS[NAMES.index(action)]).tolist())
    assert cell not in state.lake.holes
  return cell


def test_shortest_path_goes_around_holes():
  state, _ = firm().load('SHG\nFHF\nFFF')
  path = frozen_lake.shortest_path(state)
  assert path == ['Down', 'Down', 'Right', 'Right', 'Up', 'Up']
  assert frozen_lake.shortest_path(firm().load('SHG')[0]) is None


@pytest.mark.parametrize('board', ['', 'SF\nG', 'SXG', 'SFF', 'SSG'])
def test_bad_board_raises(board):
  with pytest.raises(ValueError, match='board|lake'):
    firm().load(board)
