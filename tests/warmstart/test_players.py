"""Scripted players: their thoughts, their choices, how often they win."""

import os
import pathlib

import numpy as np
import pytest

from actfocus_jax.config import fields
from actfocus_jax.envs import ENVS, frozen_lake, sokoban, sudoku, webshop
from actfocus_jax.envs.webshop import catalogue, goals
from actfocus_jax.rollout import env_pool
from actfocus_jax.warmstart import players

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAKES, ROOMS = players.frozen_lake, players.sokoban
NUMBERS, SHOPPERS = players.sudoku, players.webshop


def success_rate(
  env, player, seeds, *, turns=5, max_actions=2, budget=10, repeats=1
):
  """Share of the episodes that a player solves."""
  solved = []
  for repeat in range(repeats):
    played = players.play(
      env,
      player,
      seeds,
      pool=env_pool.EnvPool(),
      turns=turns,
      max_actions=max_actions,
      budget=budget,
      repeat=repeat,
    )
    assert not isinstance(played, env_pool.Failed), played.details
    solved += played
  return np.mean(solved)


def answer(player, env, board, seed=0, moves=()):
  """Thought and actions on a board after some moves."""
  state, _ = env.load(board)
  for move in moves:
    state, _ = env.step(state, move)
  return player.respond(env, state, np.random.default_rng(seed))


@pytest.mark.parametrize('game', players.PLAYERS)
def test_answers_repeat_by_seed_and_are_short(game):
  env = ENVS[game]()
  for player in players.PLAYERS[game].values():
    for seed in range(30):
      state, _ = env.reset(seed)
      first, second = (
        player.respond(env, state, np.random.default_rng(seed))
        for _ in range(2)
      )
      assert first == second
      assert 1 <= len(first[1]) <= 2
      assert not env.actions or set(first[1]) <= set(env.actions)
      assert len(first[0].split()) <= 25


# Measured on seeds 0..1999 (Sokoban 0..999) within the limits of each.
MEASURED = {
  ('frozen_lake', 'careless'): 0.525,
  ('frozen_lake', 'careful'): 0.826,
  ('frozen_lake', 'random'): 0.262,
  ('sokoban', 'careless'): 0.565,
  ('sokoban', 'random'): 0.189,
  ('sudoku', 'careless'): 0.362,
  ('sudoku', 'orderly'): 0.18,
  ('sudoku', 'random'): 0.142,
  ('webshop', 'careless'): 0.352,
  ('webshop', 'careful'): 1.0,
  ('webshop', 'random'): 0.001,
}


@pytest.mark.parametrize(('game', 'name'), MEASURED)
def test_success_is_that_of_the_measurement(game, name):
  assert {name for g, name in MEASURED if g == game} == {*players.PLAYERS[game]}
  limits = fields.limits(game)
  limits['budget'] = limits.pop('action_budget')
  env, player = ENVS[game](), players.PLAYERS[game][name]
  rate = success_rate(env, player, range(10_000, 10_500), **limits)
  expected = MEASURED[game, name]
  error = np.sqrt(expected * (1 - expected) * (1 / 500 + 1 / 1000))
  assert abs(rate - expected) <= 3 * error


# --- play --------------------------------------------------------------------


def test_perfect_players_win_what_can_be_won():
  seeds = range(123, 203)
  lake = frozen_lake.FrozenLake(success_probability=1.0)
  careful = LAKES.FrozenLakeCareful(skill=1.0)
  assert success_rate(lake, careful, seeds) == 1.0
  env = sokoban.Sokoban()
  lengths = [len(sokoban.solve(env.reset(seed)[0])) for seed in seeds]
  rate = success_rate(env, ROOMS.SokobanCareless(skill=1.0), seeds, budget=4)
  assert 0 < rate < 1
  assert rate == np.mean(np.array(lengths) <= 4)


# --- FrozenLake and Sokoban --------------------------------------------------


@pytest.mark.parametrize(
  'env, board, thought',
  [
    (
      frozen_lake.FrozenLake(),
      'FFFF\nFFHS\nGFFF\nFFFF',
      'I am at (1, 3), the goal is at (2, 0): 1 down, 3 left.',
    ),
    (
      sokoban.Sokoban(),
      '__P\n_X_\n_O_',
      'I am at (0, 2), the box at (1, 1), the target at (2, 1). '
      'Push Down from (0, 1): Left, Down.',
    ),
    (
      sokoban.Sokoban(),
      'SX√\n__O',
      'I am at (0, 0), the boxes at (0, 1) and (0, 2), '
      'the targets at (0, 0) and (0, 2) and (1, 2). No way.',
    ),
  ],
)
def test_thought_of_every_player_by_hand(env, board, thought):
  game = next(name for name, kind in ENVS.items() if type(env) is kind)
  for player in players.PLAYERS[game].values():
    assert answer(player, env, board)[0] == thought


def test_careless_overlooks_the_hole_and_careful_does_not():
  env, board = frozen_lake.FrozenLake(), 'SHG\nFFF'
  careless = LAKES.FrozenLakeCareless(skill=1.0)
  careful = LAKES.FrozenLakeCareful(skill=1.0)
  assert answer(careless, env, board)[1] == ['Right', 'Right']
  assert answer(careful, env, board)[1] == ['Down', 'Right']


def test_second_action_starts_where_the_first_leads():
  env = frozen_lake.FrozenLake()
  careless = LAKES.FrozenLakeCareless(skill=1.0)
  answers = {
    tuple(answer(careless, env, 'SF\nFG', seed)[1]) for seed in range(20)
  }
  assert answers == {('Down', 'Right'), ('Right', 'Down')}
  # From the border, a step against it leads nowhere.
  assert answer(careless, env, 'FSG')[1] == ['Right']
  pusher = ROOMS.SokobanCareless(skill=1.0)
  assert answer(pusher, sokoban.Sokoban(), 'PXO')[1] == ['Right']


@pytest.mark.parametrize(
  'make, env, board, good, habitual, other',
  [
    (
      LAKES.FrozenLakeCareless,
      frozen_lake.FrozenLake(),
      *('SFFG', 'Right', 'Up', 'Left'),
    ),
    (
      NUMBERS.SudokuCareless,
      sudoku.Sudoku(),
      *('1230 3412 2143 4321', '1,4,4', '1,4,1', '1,4,2'),
    ),
  ],
)
def test_skill_and_habit_are_probabilities(
  make, env, board, good, habitual, other
):
  player = make(skill=0.3, habit=0.4, length=1)
  actions = [answer(player, env, board, seed)[1] for seed in range(2000)]
  for action, share in ((good, 0.375), (habitual, 0.475), (other, 0.075)):
    hits = [chosen == [action] for chosen in actions]
    error = np.sqrt(share * (1 - share) / len(hits))
    assert abs(np.mean(hits) - share) <= 3.5 * error


# --- Sudoku ------------------------------------------------------------------

TWO_WAYS = '1234 3412 0103 0301/1234 3412 2143 4321'
# name: (board, moves before, thought, actions of skill 1)
GOLDEN = {
  'two with one valid number': (
    '1200 3412 2143 4320',
    [],
    'Empty (1,3): [3], (1,4): [4].',
    ['1,3,3', '1,4,4'],
  ),
  'no second one that needs the first': (
    '4000 2004 3421 1240/4132 2314 3421 1243',
    [],
    'Empty (4,4): [3].',
    ['4,4,3'],
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
def test_sudoku_answer_by_hand(name):
  board, moves, thought, actions = GOLDEN[name]

  def answered(**options):
    player = NUMBERS.SudokuCareless(**options)
    return answer(player, sudoku.Sudoku(), board, moves=moves)

  assert answered(skill=1.0) == (thought, actions)
  assert answered(skill=0.0)[0] == thought
  assert answered(skill=1.0, length=1)[1] == actions[:1]


def test_orderly_player_takes_the_first_cell_of_the_list():
  env, player = sudoku.Sudoku(), NUMBERS.SudokuOrderly(skill=1.0)
  board = '0001 0104 0013 1342/3421 2134 4213 1342'
  assert answer(player, env, board) == (
    'Empty (1,1): [2, 3, 4].',
    ['1,1,3'],
  )
  assert '  - (1,1): [2, 3, 4]\n' in env.load(board)[1]
  # It does not look ahead: a cell that nothing fits into is met in its turn.
  thought, _ = answer(player, env, TWO_WAYS, moves=('3,1,2', '4,3,4'))
  assert thought.startswith('Nothing fits into (3,3), so I change')


def test_sudoku_number_is_changed_where_nothing_fits():
  stuck = ['3,1,2', '4,3,4']  # (3,3) and (4,1) have no valid number now
  env, player = sudoku.Sudoku(), NUMBERS.SudokuCareless(skill=1.0)
  answers = [answer(player, env, TWO_WAYS, seed, stuck) for seed in range(20)]
  assert {(thought, *actions) for thought, actions in answers} == {
    ('Nothing fits into (3,3), so I change (3,1).', '3,1,2'),
    ('Nothing fits into (3,3), so I change (4,3).', '4,3,2'),
  }


# --- WebShop -----------------------------------------------------------------

EPISODE = {'turns': 9, 'max_actions': 1, 'budget': 9}


@pytest.fixture(scope='module')
def shop():
  return webshop.WebShop(results_per_page=3)


def rng(seed=0):
  return np.random.default_rng(seed)


def test_perfect_shopper_by_hand(shop):
  state, _ = shop.load('17')
  assert shop.goal(state).text == (
    'Find me energy saving, solar powered lamps with color: black, '
    'and size: tiny, and price lower than 40.00 dollars'
  )
  player, answers = SHOPPERS.WebShopCareless(skill=1.0), []
  for _ in range(5):
    thought, actions = player.respond(shop, state, rng())
    answers.append((thought, *actions))
    state, step = shop.step(state, actions[0])
  assert answers == [
    (
      'I look for energy saving, solar powered lamps.',
      'search[energy saving, solar powered lamps]',
    ),
    # The first result costs 25.00, but it is neither solar powered nor black.
    ('B548 at $10.00 fits.', 'click[b548]'),
    ('Next color: black.', 'click[black]'),
    ('Next size: tiny.', 'click[tiny]'),
    ('All is chosen.', 'click[buy now]'),
  ]
  assert step.success


def test_choices_prefer_equal_names_and_values():
  product = catalogue.Product(
    'B01',
    'Thing',
    options=(
      ('style', ('9', 'red')),
      ('size', ('9 wide', '9', '8')),
      ('color', ('dark red', 'red')),
    ),
  )

  def wish(*options):
    goal = goals.Goal('B01', '', (), options, None, '', '', ())
    return SHOPPERS.choices(goal, product)

  assert wish(('size', '9'), ('color', 'red')) == {'size': '9', 'color': 'red'}
  assert wish(('style', '9'), ('size', '9')) == {'style': '9', 'size': '9'}
  assert wish(('size', '7')) == {}
  assert wish(('', '9'), ('', '9')) == {'size': '9', 'style': '9'}


def test_perfect_shoppers_buy_on_the_public_set():
  default = ROOT.parent / 'shared' / 'data' / 'webshop-small'
  place = pathlib.Path(os.environ.get('ACTFOCUS_WEBSHOP_DATA') or default)
  if not place.is_dir():
    pytest.skip('no public WebShop set; ACTFOCUS_WEBSHOP_DATA may name it')
  env = webshop.WebShop(data=str(place))
  careful, reader = SHOPPERS.WebShopCareful(), SHOPPERS.WebShopCareless(1.0)
  seeds = range(10_000, 10_200)
  assert success_rate(env, careful, seeds, **EPISODE) >= 0.95
  # By the goal's fields and the reward, but not by the product it was made of.
  assert success_rate(env, reader, seeds, **EPISODE) > 0.9
