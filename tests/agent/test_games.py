"""Which game a seed plays."""

import collections

import pytest

from actfocus_jax.agent import games


def cast(*shares):
  return [
    games.Game(str(i), None, games.Limits(), share)
    for i, share in enumerate(shares)
  ]


@pytest.mark.parametrize('shares', [(1, 1), (3, 1), (1, 2, 5), (0.1, 0.9)])
@pytest.mark.parametrize('first', [123, 10_000, 10**9])
def test_shares_hold_over_any_few_seeds(shares, first):
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
def test_every_game_meets_every_remainder_of_the_seeds(boards):
  """Boards are taken by the remainder; some of these are Fibonacci numbers."""
  played = cast(1, 1)
  seeds = range(10_000, 10_000 + 16 * boards)
  for name in '01':
    met = {s % boards for s in seeds if games.pick(played, s).name == name}
    assert len(met) > 0.99 * boards, name


def test_one_game_is_always_played():
  (game,) = cast(0.25)
  assert {games.pick([game], seed).name for seed in range(99)} == {'0'}


def test_a_seed_says_it_alone():
  played = cast(1, 1)
  assert [games.pick(played, s) for s in (7, 8, 7)][::2] == [
    games.pick(played, 7)
  ] * 2
