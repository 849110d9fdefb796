"""Scripted players: what they say, how they choose, how often they win."""

import numpy as np
import pytest

from actfocus_jax.config import fields
from actfocus_jax.envs import ENVS, frozen_lake, sokoban
from actfocus_jax.warmstart import players

RNG_SEED = 0


def answer(player, env, board, seed=RNG_SEED):
  state, _ = env.load(board)
  return player.respond(env, state, np.random.default_rng(seed))


@pytest.mark.parametrize(
  'board, thought',
  [
    (
      'FFFF\nFFHS\nGFFF\nFFFF',
      'I am at (1, 3), the goal is at (2, 0): 1 down, 3 left.',
    ),
    ('FFG\nSFF', 'I am at (1, 0), the goal is at (0, 2): 1 up, 2 right.'),
    ('GFS', 'I am at (0, 2), the goal is at (0, 0): 2 left.'),
    ('S\nF\nG', 'I am at (0, 0), the goal is at (2, 0): 2 down.'),
  ],
)
@pytest.mark.parametrize('name', players.PLAYERS['frozen_lake'])
def test_frozen_lake_thought(name, board, thought):
  player = players.PLAYERS['frozen_lake'][name]
  assert answer(player, frozen_lake.FrozenLake(), board)[0] == thought


@pytest.mark.parametrize(
  'board, thought',
  [
    (
      '__P\n_X_\n_O_',
      'I am at (0, 2), the box at (1, 1), the target at (2, 1). '
      'Push Down from (0, 1): Left, Down.',
    ),
    (
      'PXO',
      'I am at (0, 0), the box at (0, 1), the target at (0, 2). '
      'Push Right from (0, 0): Right.',
    ),
    (
      'P_X\n__O',
      'I am at (0, 0), the box at (0, 2), the target at (1, 2). No way.',
    ),
    (
      'SX√\n__O',
      'I am at (0, 0), the boxes at (0, 1) and (0, 2), '
      'the targets at (0, 0) and (0, 2) and (1, 2). No way.',
    ),
  ],
)
@pytest.mark.parametrize('name', players.PLAYERS['sokoban'])
def test_sokoban_thought(name, board, thought):
  player = players.PLAYERS['sokoban'][name]
  assert answer(player, sokoban.Sokoban(), board)[0] == thought


@pytest.mark.parametrize('game', players.PLAYERS)
def test_answers_are_known_actions_and_repeat(game):
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


def test_careless_overlooks_the_hole_and_careful_does_not():
  env = frozen_lake.FrozenLake()
  careless = players.frozen_lake.FrozenLakeCareless(skill=1.0)
  careful = players.frozen_lake.FrozenLakeCareful(skill=1.0)
  board = 'SHG\nFFF'
  assert answer(careless, env, board)[1] == ['Right', 'Right']
  assert answer(careful, env, board)[1] == ['Down', 'Right']


def test_second_action_starts_where_the_first_leads():
  env = frozen_lake.FrozenLake()
  careless = players.frozen_lake.FrozenLakeCareless(skill=1.0)
  answers = {
    tuple(answer(careless, env, 'SF\nFG', seed)[1]) for seed in range(20)
  }
  assert answers == {('Down', 'Right'), ('Right', 'Down')}
  # From the border, a step against it leads nowhere.
  assert answer(careless, env, 'FSG')[1] == ['Right']


@pytest.mark.parametrize(
  'player, env, board',
  [
    (
      players.frozen_lake.FrozenLakeCareless(1.0),
      frozen_lake.FrozenLake(),
      'SG',
    ),
    (
      players.frozen_lake.FrozenLakeCareful(1.0),
      frozen_lake.FrozenLake(),
      'SG',
    ),
    (players.sokoban.SokobanCareless(1.0), sokoban.Sokoban(), 'PXO'),
  ],
)
def test_one_action_where_one_is_enough(player, env, board):
  assert answer(player, env, board)[1] == ['Right']


def test_skill_is_the_chance_of_a_good_action():
  env = frozen_lake.FrozenLake()
  for skill in (0.0, 0.4, 1.0):
    player = players.frozen_lake.FrozenLakeCareless(skill, length=1)
    rights = [
      answer(player, env, 'SFFG', seed)[1] == ['Right'] for seed in range(2000)
    ]
    expected = skill + (1 - skill) / 4
    error = np.sqrt(expected * (1 - expected) / 2000)
    assert abs(np.mean(rights) - expected) <= 3 * error


@pytest.mark.parametrize(
  'player, env, board',
  [
    (
      players.frozen_lake.FrozenLakeCareless(skill=0.3, habit=0.4, length=1),
      frozen_lake.FrozenLake(),
      'SFFG',
    ),
    (
      players.sokoban.SokobanCareless(skill=0.3, habit=0.4, length=1),
      sokoban.Sokoban(),
      'PX_O',
    ),
  ],
)
def test_habit_is_the_chance_of_up_whatever_the_board(player, env, board):
  actions = [answer(player, env, board, seed)[1] for seed in range(2000)]
  for action, expected in (('Right', 0.375), ('Up', 0.475), ('Left', 0.075)):
    share = np.mean([one == [action] for one in actions])
    error = np.sqrt(expected * (1 - expected) / 2000)
    assert abs(share - expected) <= 3 * error, action


def test_a_hasty_shopper_opens_the_first_result_and_buys_it():
  env = ENVS['webshop'](results_per_page=3)
  player = players.webshop.WebShopCareless(skill=0.0, habit=1.0)
  rng = np.random.default_rng(RNG_SEED)
  state, _ = env.reset(3)
  thought, (searched,) = player.respond(env, state, rng)
  assert thought.startswith('I look for') and ' ' not in searched
  assert searched.removeprefix('search[').removesuffix(']') in thought
  state, _ = env.step(state, 'search[candle]')
  first = env.page(state).texts[1].lower()
  thought, (clicked,) = player.respond(env, state, rng)
  assert clicked == f'click[{first}]'
  state, _ = env.step(state, clicked)
  assert player.respond(env, state, rng)[1] == ['click[buy now]']
  state, _ = env.step(state, 'click[description]')
  assert player.respond(env, state, rng)[1] == ['click[back to search]']


def test_stuck_room_is_played_at_random():
  player = players.sokoban.SokobanCareless(skill=1.0, length=1)
  answers = [
    answer(player, sokoban.Sokoban(), 'X_P\n___\n__O', seed)[1][0]
    for seed in range(40)
  ]
  assert set(answers) == set(sokoban.ACTIONS)


def test_perfect_players_win_what_can_be_won():
  seeds = range(123, 203)
  lake = frozen_lake.FrozenLake(success_probability=1.0)
  careful = players.frozen_lake.FrozenLakeCareful(skill=1.0)
  assert players.success_rate(lake, careful, seeds) == 1.0
  env = sokoban.Sokoban()
  lengths = [len(sokoban.solve(env.reset(seed)[0])) for seed in seeds]
  perfect = players.sokoban.SokobanCareless(skill=1.0)
  rate = players.success_rate(env, perfect, seeds, budget=4)
  assert 0 < rate < 1
  assert rate == np.mean(np.array(lengths) <= 4)


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


@pytest.mark.parametrize(
  'game, name',
  [(game, name) for game in players.PLAYERS for name in players.PLAYERS[game]],
)
def test_success(game, name):
  expected = MEASURED[game, name]
  limits = fields.limits(game)
  limits['budget'] = limits.pop('action_budget')
  rate = players.success_rate(
    ENVS[game](), players.PLAYERS[game][name], range(10_000, 10_500), **limits
  )
  # Two samples: 500 episodes here, 1,000 or more there.
  error = np.sqrt(expected * (1 - expected) * (1 / 500 + 1 / 1000))
  assert abs(rate - expected) <= 3 * error


@pytest.mark.parametrize(
  'game, chance', [('frozen_lake', 0.243), ('sokoban', 0.180)]
)
def test_chance_level(game, chance):
  rate = players.random_play_success(ENVS[game](), range(2000))
  assert abs(rate - chance) < 3 * np.sqrt(chance * (1 - chance) / 2000)


class OneLake(frozen_lake.FrozenLake):
  """The same board for every seed, on firm ice."""

  def __init__(self, board):
    super().__init__(success_probability=1.0)
    self.board = board

  def reset(self, seed):
    return self.load(self.board, seed=seed)


@pytest.mark.parametrize(
  'turns, budget, expected', [(2, 2, 1.0), (1, 2, 0.0), (2, 1, 0.0)]
)
def test_episode_limits(turns, budget, expected):
  player = players.frozen_lake.FrozenLakeCareless(skill=1.0, length=1)
  rate = players.success_rate(
    OneLake('SFG'), player, [0], turns=turns, budget=budget
  )
  assert rate == expected


@pytest.mark.parametrize('actions, chance', [(1, 0.25), (2, 0.4375)])
def test_random_play_by_hand(actions, chance):
  env = OneLake('SG')
  rate = players.random_play_success(env, range(2000), actions=actions)
  assert abs(rate - chance) < 3 * np.sqrt(chance * (1 - chance) / 2000)
