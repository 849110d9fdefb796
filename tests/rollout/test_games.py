"""Which game a seed plays."""

import collections

import numpy as np
import pytest

from actfocus_jax.rollout import games


def cast(*shares):
  return [
    games.Game(str(i), None, games.Limits(), share)
    for i, share in enumerate(shares)
  ]


@pytest.mark.parametrize('shares', [(1, 1), (3, 1), (1, 2, 5), (0.1, 0.9)])
@pytest.mark.parametrize('first', [123, 10_000, 10**9])
def test_pick_keeps_the_shares_over_few_seeds(shares, first):
  """Closer to what is due than fair coins, which would be off by sqrt(n)."""
  played = cast(*shares)
  for count in (8, 64, 1000):
    seen = collections.Counter(
      games.pick(played, seed).name for seed in range(first, first + count)
    )
    for i, share in enumerate(shares):
      due = count * share / sum(shares)
      assert abs(seen[str(i)] - due) <= (3 if count < 100 else 8), (count, seen)


@pytest.mark.parametrize('boards', [75, 89, 144, 233])
def test_pick_gives_each_game_every_remainder(boards):
  """Boards are taken by the remainder; some of these are Fibonacci numbers."""
  played = cast(1, 1)
  seeds = range(10_000, 10_000 + 16 * boards)
  for name in '01':
    met = {s % boards for s in seeds if games.pick(played, s).name == name}
    assert len(met) > 0.99 * boards, name


class Whole:
  instructions = 'Play.'
  actions = ('Red', 'blue green')

  def reset(self, seed):
    pass

  def step(self, state, action):
    pass


@pytest.mark.parametrize('actions', [Whole.actions, ['a', 'b'], (), ('<b>',)])
def test_playable_environment_has_no_problem(actions):
  env = Whole()
  env.actions = actions
  assert games.problem(env) is None


@pytest.mark.parametrize(
  ('name', 'value', 'words'),
  [
    ('reset', None, 'has no method `reset`; allowed: a class with'),
    ('instructions', 7, 'instructions 7; allowed: a text'),
    ('actions', (1, 2), 'actions (1, 2); allowed: a tuple of names'),
    ('actions', 'red', "actions 'red'; allowed: a tuple of names"),
    ('actions', np.arange(2), 'actions array([0, 1]); allowed: a tuple of'),
    ('actions', ('c', 'a||b'), "'a||b', which no answer can name; allowed"),
    ('actions', (' a',), "' a', which no answer can name; allowed"),
    ('actions', ('</answer>',), 'which no answer can name; allowed'),
    ('actions', ('Red', 'red'), "several actions that are 'Red' in one case"),
  ],
)
def test_unplayable_environment_is_described(name, value, words):
  env = Whole()
  setattr(env, name, value)
  assert words in games.problem(env)
  assert games.problem(object()).startswith('has no method `reset`; allowed')
