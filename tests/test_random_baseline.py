"""The random baseline: turn by turn through the pool, within the limits."""

import dataclasses
import threading
import time
import types

import pytest

from actfocus_jax import evaluation
from actfocus_jax.envs import base, frozen_lake, sudoku
from actfocus_jax.rollout import env_pool, games
from actfocus_jax.warmstart import players

LIMITS = games.Limits()


def baseline(*played, pool=None, prompts=4):
  collector = types.SimpleNamespace(
    games=played, pool=pool or env_pool.EnvPool()
  )
  return evaluation.random_baseline(collector, range(123, 123 + prompts))


def lake():
  env = frozen_lake.FrozenLake(success_probability=1.0)
  return games.Game('frozen_lake', env, LIMITS)


class Counter:
  """Solved by `goal` actions; waits before each and counts the calls."""

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
def test_baseline_of_the_quick_start_is_145_of_512(threads):
  """512 episodes on its 32 boards: the number in README.md."""
  with env_pool.EnvPool(threads) as pool:
    row = baseline(lake(), pool=pool, prompts=32)
  assert row == {'random_success': 145 / 512, 'random_episodes': 512}


def test_baseline_of_several_games_is_their_mean():
  puzzles = games.Game('sudoku', sudoku.Sudoku(), LIMITS)
  one, other = baseline(lake()), baseline(puzzles)
  row = baseline(lake(), puzzles)
  assert row['random_episodes'] == 2 * 4 * 16
  assert row['frozen_lake/random_success'] == one['random_success'] == 19 / 64
  assert row['sudoku/random_success'] == other['random_success']
  assert row['random_success'] == pytest.approx(
    (one['random_success'] + other['random_success']) / 2
  )


@pytest.mark.parametrize('label', ['mute', 'sudoku'])
def test_baseline_without_a_random_player_is_none(label, capsys):
  """The label of a user's environment does not select one of our players."""
  mute = games.Game(label, Counter(), LIMITS)
  mute.env.actions = ()
  assert baseline(mute)['random_success'] is None
  assert not mute.env.resets and not capsys.readouterr().out


@pytest.mark.parametrize(
  ('limits', 'most'),
  [
    (dict(turns=5, max_actions=2, action_budget=10), 10),
    (dict(turns=2, max_actions=2, action_budget=10), 4),
    (dict(turns=5, max_actions=2, action_budget=3), 3),
  ],
)
def test_baseline_plays_no_more_actions_than_an_episode_has(limits, most):
  limits = dataclasses.replace(LIMITS, **limits)
  for goal, success in ((most, 1.0), (most + 1, 0.0)):
    env = Counter(goal)
    row = baseline(games.Game('count', env, limits), prompts=1)
    assert row['random_success'] == success and env.steps == 16 * most


def test_time_limit_holds_for_a_turn_not_for_an_episode():
  """Ten turns take twice the limit together, and none comes near it."""
  env, random = Counter(seconds=0.1), players.FOR_ALL['random']
  before = threading.active_count()
  limits = dict(turns=10, max_actions=1, budget=10)
  with env_pool.EnvPool(16, time_limit=0.5) as pool:
    solved = players.play(env, random, [1, 2], pool=pool, **limits)
    assert solved == [True, True]
    assert threading.active_count() <= before + 16


def test_failing_environment_has_no_baseline(capsys):
  env = Counter(broken=[125])
  row = baseline(games.Game('count', env, LIMITS))
  assert row == {'random_success': None, 'random_episodes': 64}
  assert 'RuntimeError: no count today' in capsys.readouterr().out
  # The others are not waited for fifteen more times.
  assert env.resets == [123, 124, 125, 126] and not env.steps


def test_hanging_environment_is_left_soon():
  end = threading.Event()
  pool = env_pool.EnvPool(2, time_limit=0.2)
  begin = time.monotonic()
  game = games.Game('count', Counter(hung=end), LIMITS)
  assert baseline(game, pool=pool)['random_success'] is None
  assert time.monotonic() - begin < 10
  assert len(game.env.resets) == 4  # And as many threads left behind.
  end.set()
  pool.close()
