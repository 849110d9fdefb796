"""Sokoban: text, pushes, rewards, and how hard the generated rooms are."""

import collections
import random

import numpy as np
import pytest

from actfocus_jax.envs import sokoban

ROOM = """\
######
#_O__#
#_X__#
#_P_O#
#___X#
######"""
OFFSETS = {'Up': (-1, 0), 'Down': (1, 0), 'Left': (0, -1), 'Right': (0, 1)}


def play(board, actions):
  """Rewards of the actions, and the last step."""
  env = sokoban.Sokoban()
  state, _ = env.load(board)
  rewards = []
  for action in actions:
    state, step = env.step(state, action)
    rewards.append(step.reward)
  return rewards, step


def test_text_is_the_board():
  env = sokoban.Sokoban()
  for board in (ROOM, '#P√OX#', 'S_X\n_O_\nX__'):
    assert env.load(board)[1] == board


# name: (board, actions, rewards, last text)
GOLDEN = {
  'winning push': ('PXO', ['Right'], [10.9], '_P√'),
  'push on floor': ('PX_O', ['Right'], [-0.1], '_PXO'),
  'off and on': ('P√_O', ['Right', 'Right'], [-1.1, 10.9], '_OP√'),
  'onto a target': ('PO_X', ['Right', 'Right'], [-0.1, -0.1], '_OPX'),
  'edge': ('PXO', ['Up'], [-0.1], 'PXO'),
  'two boxes': ('OPXXO', ['Right'], [-0.1], 'OPXXO'),
  'first of two': ('OXPXO', ['Left', 'Right'], [0.9, -0.1], '√_PXO'),
  'last of two': ('√_PXO', ['Right'], [10.9], '√__P√'),
  'no pulling': ('_PXO', ['Left'], [-0.1], 'P_XO'),
  'from target to target': ('O√PX_', ['Left'], [-0.1], '√S_X_'),
  'solved from the start': ('_P√', ['Left'], [9.9], 'P_√'),
}


@pytest.mark.parametrize('name', GOLDEN)
def test_step_by_hand(name):
  board, actions, expected, text = GOLDEN[name]
  rewards, step = play(board, actions)
  assert rewards == pytest.approx(expected)
  assert step.text == text
  assert step.info['effective'] == (text != board)
  assert step.done == step.success == (expected[-1] > 9)


class CharacterSokoban:
  """The rules restated on two arrays of characters."""

  def __init__(self, board):
    cells = np.array([list(row) for row in board.split('\n')])
    self.ground = np.select(
      [cells == '#', np.isin(cells, ['O', '√', 'S'])], ['#', 'O'], '_'
    )
    self.things = np.select(
      [np.isin(cells, ['X', '√']), np.isin(cells, ['P', 'S'])], ['X', 'P'], ' '
    )

  def on_targets(self):
    return np.sum((self.things == 'X') & (self.ground == 'O'))

  def step(self, action):
    before = self.on_targets()
    here = np.argwhere(self.things == 'P')[0]
    ahead, behind = (
      tuple(here + n * np.array(OFFSETS[action])) for n in (1, 2)
    )
    if self.things[ahead] == 'X' and self.free(behind):
      self.things[ahead], self.things[behind] = ' ', 'X'
    if self.free(ahead):
      self.things[tuple(here)], self.things[ahead] = ' ', 'P'
    change = self.on_targets() - before
    won = self.on_targets() == np.sum(self.things == 'X')
    return -0.1 + np.sign(change) + 10.0 * won, won

  def free(self, cell):
    return self.ground[cell] != '#' and self.things[cell] == ' '

  def text(self):
    grounds = {'_': '_XP', 'O': 'O√S', '#': '#'}
    pairs = zip(self.ground, self.things, strict=True)
    return '\n'.join(
      ''.join(grounds[g][' XP'.index(t)] for g, t in zip(*rows, strict=True))
      for rows in pairs
    )


@pytest.mark.parametrize('boxes, size', [(1, (6, 6)), (2, (6, 8)), (3, (7, 7))])
def test_steps_match_an_independent_implementation(boxes, size):
  env = sokoban.Sokoban(rows=size[0], cols=size[1], boxes=boxes)
  rng = np.random.default_rng(0)
  pushed = 0
  for seed in range(10):
    state, text = env.reset(seed)
    twin = CharacterSokoban(text)
    for action in rng.choice(env.actions, 60):
      following, step = env.step(state, str(action))
      reward, won = twin.step(action)
      assert step.text == twin.text()
      assert step.reward == pytest.approx(reward)
      assert step.done == won
      pushed += following.boxes != state.boxes
      state = following
  assert pushed > 10


def test_solution_is_shortest():
  state, _ = sokoban.Sokoban().load('#####\n#O__#\n#_X_#\n#P__#\n#####')
  solution = sokoban.solve(state)
  assert len(solution) == exhaustive_length(state, limit=8)
  for action in solution:
    state = sokoban.push(state, action)
  assert sokoban.is_solved(state)


def exhaustive_length(state, limit):
  """Length of a shortest solution, by trying every sequence of actions."""
  states = [state]
  for length in range(limit + 1):
    if any(sokoban.is_solved(s) for s in states):
      return length
    states = [sokoban.push(s, a) for s in states for a in sokoban.ACTIONS]
  return None


def test_solvable_rooms_are_never_called_unsolvable():
  """On random rooms; every cell is equally likely a box or a target."""
  rng = random.Random(0)
  proven = 0
  for _ in range(300):
    cells = [*'PXOXO', *rng.choices('__#', k=7)]
    rng.shuffle(cells)
    board = '\n'.join(''.join(cells[i : i + 4]) for i in (0, 4, 8))
    state, _ = sokoban.Sokoban().load(board)
    is_unsolvable = sokoban.Sokoban().is_unsolvable(state)
    proven += is_unsolvable
    assert not is_unsolvable or sokoban.solve(state) is None, board
  assert proven > 100


@pytest.mark.parametrize(
  'rows, cols, boxes', [(6, 6, 1), (3, 5, 1), (5, 9, 1), (7, 6, 2), (6, 6, 3)]
)
def test_generated_rooms_are_whole_and_solvable(rows, cols, boxes):
  env = sokoban.Sokoban(rows=rows, cols=cols, boxes=boxes)
  for seed in range(20):
    state, text = env.reset(seed)
    lines = text.split('\n')
    assert [len(line) for line in lines] == [cols] * rows
    border = lines[0] + lines[-1] + ''.join(k[0] + k[-1] for k in lines)
    assert set(border) == {'#'}
    assert text.count('X') == boxes
    assert text.count('O') + text.count('S') == boxes
    assert text.count('P') + text.count('S') == 1
    assert '√' not in text
    assert env.load(text) == (state, text)
    assert boxes > 2 or sokoban.solve(state)


def test_evaluation_rooms_stay_the_same():
  # A change here changes what success on the evaluation seeds means.
  env = sokoban.Sokoban()
  assert env.reset(124)[1] == '######\n#O___#\n#____#\n###X_#\n###_P#\n######'


def chance(state, actions=10):
  """Exact chance that uniformly random actions solve a room."""
  weight, solved = {state: 1.0}, 0.0
  for _ in range(actions):
    following = collections.defaultdict(float)
    for source, mass in weight.items():
      for action in sokoban.ACTIONS:
        following[sokoban.push(source, action)] += mass / 4
    solved += sum(m for s, m in following.items() if sokoban.is_solved(s))
    weight = {s: m for s, m in following.items() if not sokoban.is_solved(s)}
  return solved


def test_difficulty_is_that_of_the_reference():
  env = sokoban.Sokoban()
  chances = [chance(env.reset(seed)[0]) for seed in range(123, 523)]
  # The reference's 0.180 is itself a mean over 2,000 rooms.
  error = np.std(chances) * np.sqrt(1 / 400 + 1 / 2000)
  assert abs(np.mean(chances) - 0.180) < 3 * error


@pytest.mark.parametrize(
  'board',
  ['', 'PX\nO', 'PX?O', 'XO', 'PSXO', 'PXXO'],
)
def test_bad_board_raises(board):
  with pytest.raises(ValueError, match='board|room'):
    sokoban.Sokoban().load(board)


def test_floor_too_small_for_its_boxes_raises():
  env = sokoban.Sokoban(rows=9, cols=9, boxes=6, walk_steps=1)
  with pytest.raises(RuntimeError, match='6 boxes'):
    env.reset(0)
