"""Group selection: which groups, how many, and in which order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import selection

# Their spreads, unbiased: 0, sqrt(2), 0, sqrt(8), sqrt(2) / 2.
RETURNS_PG = jnp.array(
  [[-1.1, -1.1], [0.0, 2.0], [0.5, 0.5], [-2.0, 2.0], [1.0, 0.0]]
)


def test_spread_matches_numpy():
  rng = np.random.default_rng(0)
  return_PG = rng.normal(-3, 2, (6, 16)).astype(np.float32)
  np.testing.assert_allclose(
    selection.group_spread(jnp.array(return_PG)),
    return_PG.astype(np.float64).std(axis=1, ddof=1),
    rtol=1e-5,
  )


@pytest.mark.parametrize('value', [-1.1, 0.1, 3333.3])
@pytest.mark.parametrize('num_members', [1, 3, 7, 16])
def test_equal_returns_have_no_spread(value, num_members):
  return_PG = jnp.full((2, num_members), value, jnp.float32)
  assert not np.any(selection.group_spread(return_PG))
  assert not np.any(jax.jit(selection.group_spread)(return_PG))


def test_rounding_is_no_spread_and_a_small_difference_is():
  # The same eleven rewards summed forwards and backwards.
  rewards = np.array([1.0] + [-0.1] * 10, np.float32)
  sums = [np.cumsum(r)[-1] for r in (rewards, rewards[::-1])]
  assert sums[0] != sums[1]
  return_PG = jnp.array([sums, [-1.1, -1.1001], [1e-3, 2e-3]])
  spread_P = selection.group_spread(return_PG)
  np.testing.assert_array_equal(spread_P > 0, [False, True, True])


@pytest.mark.parametrize(
  ('num_groups', 'ratio', 'count'),
  [(8, 0.25, 2), (8, 0.26, 3), (8, 1.0, 8), (8, 0.01, 1), (100, 0.07, 7)],
)
def test_kept_count(num_groups, ratio, count):
  assert selection.kept_count(num_groups, ratio) == count


@pytest.mark.parametrize(
  ('ratio', 'keep_P'),
  [
    (0.2, [0, 0, 0, 1, 0]),
    (0.4, [0, 1, 0, 1, 0]),
    (0.5, [0, 1, 0, 1, 1]),
    (0.8, [1, 1, 0, 1, 1]),  # Filled up by the earlier group of no spread.
    (1.0, [1, 1, 1, 1, 1]),
  ],
)
def test_top_k_by_hand(ratio, keep_P):
  got_P = selection.keep_groups(RETURNS_PG, ratio=ratio)
  np.testing.assert_array_equal(got_P, np.array(keep_P, bool))


@pytest.mark.parametrize(
  ('ratio', 'keep_P'),
  [
    (0.5, [0, 0, 0, 1, 0]),  # sqrt(8) holds 4/7 of the total.
    (0.58, [0, 1, 0, 1, 0]),
    (0.85, [0, 1, 0, 1, 0]),  # The two hold 6/7.
    (0.87, [0, 1, 0, 1, 1]),
    (1.0, [0, 1, 0, 1, 1]),  # Groups without spread add nothing.
  ],
)
def test_top_p_by_hand(ratio, keep_P):
  got_P = selection.keep_groups(RETURNS_PG, ratio=ratio, rule='top_p')
  np.testing.assert_array_equal(got_P, np.array(keep_P, bool))


def test_top_p_takes_half_of_equal_groups():
  # In float32 five of these spreads sum to less than half of all ten.
  return_PG = jnp.tile(jnp.array([[0.0, 1.1]]), (10, 1))
  got_P = selection.keep_groups(return_PG, ratio=0.5, rule='top_p')
  np.testing.assert_array_equal(got_P, np.arange(10) < 5)


@pytest.mark.parametrize('ratio', [0.1, 0.5, 0.9])
def test_top_p_is_the_smallest_set_that_holds_the_share(ratio):
  keep = jax.jit(selection.keep_groups, static_argnames=('ratio', 'rule'))
  for seed in range(4):
    return_PG = np.random.default_rng(seed).normal(size=(9, 4))
    return_PG = return_PG.astype(np.float32)
    keep_P = np.asarray(keep(return_PG, ratio=ratio, rule='top_p'))
    spread_P = return_PG.astype(np.float64).std(axis=1, ddof=1)
    best_P = np.sort(spread_P)[::-1]
    size = 1
    while best_P[:size].sum() < ratio * best_P.sum():
      size += 1
    assert keep_P.sum() == size
    assert spread_P[keep_P].min() == best_P[size - 1]


def test_nothing_has_spread():
  return_PG = jnp.full((4, 3), -1.1)
  top_k_P = selection.keep_groups(return_PG, ratio=0.5)
  top_p_P = selection.keep_groups(return_PG, ratio=0.5, rule='top_p')
  np.testing.assert_array_equal(top_k_P, [True, True, False, False])
  assert not np.any(top_p_P)


def test_rows_of_kept_groups_in_their_order():
  # Group 3 has the largest spread, but group 1 comes first.
  index_B = selection.kept_rows(RETURNS_PG, ratio=0.4)
  np.testing.assert_array_equal(index_B, [2, 3, 6, 7])
  assert index_B.dtype == jnp.int32


def test_rows_agree_with_the_mask_under_jit():
  rows = jax.jit(selection.kept_rows, static_argnames='ratio')
  for seed in range(3):
    rng = np.random.default_rng(seed)
    return_PG = jnp.array(rng.integers(0, 2, (8, 3)), jnp.float32)
    keep_P = selection.keep_groups(return_PG, ratio=0.4)
    np.testing.assert_array_equal(
      rows(return_PG, ratio=0.4), np.flatnonzero(np.repeat(keep_P, 3))
    )


def test_choices_out_of_range_are_errors():
  for ratio in (0.0, -0.5, 1.5, float('nan')):
    for select in (selection.keep_groups, selection.kept_rows):
      with pytest.raises(ValueError, match='ratio'):
        select(RETURNS_PG, ratio=ratio)
  with pytest.raises(ValueError, match='top_k'):
    selection.keep_groups(RETURNS_PG, ratio=0.5, rule='best')
