"""FrozenLake: text, ice, and how hard the boards are."""

import numpy as np
import pytest

from actfocus_jax.envs import frozen_lake

SPEC_BOARD = """
FFFF
FFHS
GFFF
FFFF
"""
SPEC_TEXT = """\
Coordinates:
Board size: 4 rows x 4 cols (zero-indexed).
Start: (1, 3)
Goal: (2, 0)
Player: (1, 3)
Holes: (1, 2)
Grid Map:
____
__OP
G___
____"""
# gymnasium's numbering: action a slips to a - 1 and a + 1 modulo 4.
OFFSETS = ((0, -1), (1, 0), (0, 1), (-1, 0))
NAMES = ('Left', 'Down', 'Right', 'Up')


def firm():
  return frozen_lake.FrozenLake(success_probability=1.0)


def test_text_is_that_of_the_specification():
  _, text = firm().load(SPEC_BOARD)
  assert text == SPEC_TEXT


def test_text_and_reward_in_a_hole():
  env = firm()
  _, step = env.step(env.load('FHS\nHFG')[0], 'Left')
  assert step.text == (
    'Coordinates:\n'
    'Board size: 2 rows x 3 cols (zero-indexed).\n'
    'Start: (0, 2)\n'
    'Goal: (1, 2)\n'
    'Player in hole: (0, 1)\n'
    'Holes: (0, 1), (1, 0)\n'
    'Grid Map:\n'
    '_X_\n'
    'O_G'
  )
  assert (step.reward, step.done, step.success) == (0.0, True, False)


def test_text_and_reward_on_the_goal():
  env = firm()
  _, step = env.step(env.load('SG\nFF')[0], 'Right')
  assert step.text == (
    'Coordinates:\n'
    'Board size: 2 rows x 2 cols (zero-indexed).\n'
    'Start: (0, 0)\n'
    'Goal: (0, 1)\n'
    'Player on goal: (0, 1)\n'
    'Grid Map:\n'
    '_√\n'
    '__'
  )
  assert (step.reward, step.done, step.success) == (1.0, True, True)


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


@pytest.mark.parametrize('probability', [1.0, 0.8, 1 / 3])
def test_transitions_match_gymnasium(probability):
  gymnasium = pytest.importorskip('gymnasium')
  env = frozen_lake.FrozenLake(success_probability=probability)
  for seed in range(5):
    state, _ = env.reset(seed)
    board = as_letters(state)
    peer = gymnasium.make(
      'FrozenLake-v1',
      desc=[''.join(row) for row in board],
      is_slippery=probability < 1.0,
      success_rate=probability,
    ).unwrapped
    for (row, col), letter in np.ndenumerate(board):
      if letter in 'HG':
        continue
      for index, action in enumerate(NAMES):
        dense = np.zeros((4, 4))
        for p, cell, reward, done in peer.P[row * 4 + col][index]:
          dense[divmod(cell, 4)] += p
          assert reward == (board[divmod(cell, 4)] == 'G')
          assert done == (board[divmod(cell, 4)] in 'GH')
        np.testing.assert_allclose(
          outcomes(env, state, (row, col), action), dense, atol=1e-12
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


@pytest.mark.parametrize('probability', [1.0, 0.8, 1 / 3])
def test_slip_frequency(probability):
  env = frozen_lake.FrozenLake(success_probability=probability)
  turns = [turns_of_ice(env, seed, ['Down'] * 4) for seed in range(500)]
  side = (1 - probability) / 2
  for turn, expected in ((0, probability), (-1, side), (1, side)):
    error = np.sqrt(expected * (1 - expected) / 2000)
    assert abs(np.mean(np.equal(turns, turn)) - expected) <= 3 * error


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
  'probability, best, expected',
  [(1.0, True, 1.0), (0.8, True, 0.944), (1 / 3, True, 0.551)]
  + [(0.8, False, 0.243)],
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


@pytest.mark.parametrize(
  'field, wrong',
  [
    ('size', 1),
    ('frozen_probability', 0.0),
    ('success_probability', 1.1),
  ],
)
def test_argument_out_of_range_raises(field, wrong):
  with pytest.raises(ValueError, match=field):
    frozen_lake.FrozenLake(**{field: wrong})
