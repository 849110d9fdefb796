"""The chance level: turn by turn through the host, within its limits."""

import dataclasses
import threading
import time
import types

import ml_collections
import numpy as np
import pytest

from actfocus_jax import chance
from actfocus_jax.envs import base, frozen_lake, sudoku
from actfocus_jax.rollout import env_pool, games
from actfocus_jax.warmstart import players

LIMITS = games.Limits()


def level(*played, pool=None, prompts=4):
  c = ml_collections.ConfigDict()
  c.eval = dict(first_seed=123, prompts=prompts)
  collector = types.SimpleNamespace(
    games=played, pool=pool or env_pool.EnvPool()
  )
  return chance.level(c, collector)


def lake(**limits):
  env = frozen_lake.FrozenLake(success_probability=1.0)
  return games.Game('frozen_lake', env, dataclasses.replace(LIMITS, **limits))


class Counter:
  """Solved by `goal` actions; waits before each, and notes how many meet."""

  instructions, actions = 'Go.', ('Go',)

  def __init__(self, goal=10, seconds=0.0, broken=(), hung=None):
    self.goal, self.seconds = goal, seconds
    self.broken, self.hung = broken, hung
    self.resets, self.steps = [], 0

  def reset(self, seed):
    self.resets.append(seed)
    if seed in self.broken:
      raise RuntimeError('no count today')
    if self.hung:
      self.hung.wait(30)
    return 0, ''

  def step(self, state, action):
    time.sleep(self.seconds)
    self.steps += 1
    solved = state + 1 == self.goal
    return state + 1, base.Step('', 0.0, solved, solved)


@pytest.mark.parametrize('threads', [0, 3])
def test_it_is_that_of_the_quick_start(threads):
  """512 episodes on its 32 boards: the number in README.md."""
  with env_pool.EnvPool(threads) as pool:
    found = level(lake(), pool=pool, prompts=32)
  assert found == {'random_success': 145 / 512, 'random_episodes': 512}


def test_it_is_the_mean_over_the_games():
  number = sudoku.Sudoku()
  puzzles = games.Game('sudoku', number, LIMITS)
  one = players.random_play_success(
    lake().env, range(123, 127), actions=10, plays=16
  )
  other = players.success_rate(
    number, players.PLAYERS['sudoku']['random'], range(123, 127), plays=16
  )
  found = level(lake(), puzzles)
  assert found['random_success'] == pytest.approx(np.mean([one, other]))
  assert found['random_episodes'] == 2 * 4 * 16
  assert found['frozen_lake/random_success'] == pytest.approx(one)
  assert found['sudoku/random_success'] == pytest.approx(other)


def test_a_game_that_nobody_plays_at_random_has_none(capsys):
  mute = games.Game('mute', Counter(), LIMITS)
  mute.env.actions = ()
  assert level(mute)['random_success'] is None
  assert not mute.env.resets and not capsys.readouterr().out


def test_a_label_selects_no_player():
  """A class of one's own may be called like one of ours."""
  mute = games.Game('sudoku', Counter(), LIMITS)
  mute.env.actions = ()
  assert level(mute)['random_success'] is None


@pytest.mark.parametrize(
  ('limits', 'most'),
  [
    (dict(turns=5, max_actions=2, action_budget=10), 10),
    (dict(turns=2, max_actions=2, action_budget=10), 4),
    (dict(turns=2, max_actions=1, action_budget=10), 2),
    (dict(turns=5, max_actions=2, action_budget=3), 3),
  ],
)
def test_no_more_actions_than_an_episode_has(limits, most):
  limits = dataclasses.replace(LIMITS, **limits)
  for goal, success in ((most, 1.0), (most + 1, 0.0)):
    env = Counter(goal)
    found = level(games.Game('count', env, limits), prompts=1)
    assert found['random_success'] == success and env.steps == 16 * most


def test_the_time_limit_is_of_a_turn_not_of_an_episode(monkeypatch):
  """Ten turns take twice the limit, and none of them near it."""
  monkeypatch.setattr(chance, '_PLAYS', 2)
  pool = env_pool.EnvPool(16, time_limit=0.5)
  before = threading.active_count()
  game = games.Game('count', Counter(seconds=0.1), LIMITS)
  assert level(game, pool=pool, prompts=2)['random_success'] == 1.0
  assert threading.active_count() <= before + 16
  pool.close()


def test_one_that_fails_leaves_no_level_and_says_so(capsys):
  env = Counter(broken=[125])
  found = level(games.Game('count', env, LIMITS))
  assert found == {'random_success': None, 'random_episodes': 64}
  assert 'RuntimeError: no count today' in capsys.readouterr().out
  # The others are not waited for fifteen more times.
  assert env.resets == [123, 124, 125, 126] and not env.steps


def test_one_that_hangs_is_left_soon():
  end = threading.Event()
  pool = env_pool.EnvPool(2, time_limit=0.2)
  begin = time.monotonic()
  game = games.Game('count', Counter(hung=end), LIMITS)
  assert level(game, pool=pool)['random_success'] is None
  assert time.monotonic() - begin < 10
  assert len(game.env.resets) == 4  # And as many threads left behind.
  end.set()
  pool.close()
