"""Advantages: a loop in float64, numbers by hand, exact zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import advantages


def ragged(seed, shape=(4, 20)):
  """Rewards on sampled tokens, values everywhere, gaps between turns."""
  rng = np.random.default_rng(seed)
  sampled_BT = rng.random(shape) < 0.6
  sampled_BT[:, :2] = False
  ends_BT = sampled_BT & (rng.random(shape) < 0.3)
  reward_BT = np.where(ends_BT, rng.normal(size=shape), 0)
  value_BT = rng.normal(size=shape)
  return (
    jnp.array(reward_BT, jnp.float32),
    jnp.array(value_BT, jnp.float32),
    jnp.array(sampled_BT),
  )


def gae_loop(reward_BT, value_BT, sampled_BT, *, discount, lam):
  """Each row squeezed to its sampled tokens, then the double sum of GAE."""
  advantage_BT = np.zeros(reward_BT.shape)
  for row, sampled_T in enumerate(np.asarray(sampled_BT)):
    (at_S,) = np.nonzero(sampled_T)
    reward_S = np.asarray(reward_BT, np.float64)[row, at_S]
    value_S = np.append(np.asarray(value_BT, np.float64)[row, at_S], 0.0)
    delta_S = reward_S + discount * value_S[1:] - value_S[:-1]
    for first, t in enumerate(at_S):
      decay_S = (discount * lam) ** np.arange(len(at_S) - first)
      advantage_BT[row, t] = (decay_S * delta_S[first:]).sum()
  return advantage_BT


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize(('discount', 'lam'), [(1, 1), (0.9, 0.7), (1, 0)])
def test_gae_against_a_loop(seed, discount, lam):
  batch = ragged(seed)
  got_BT, return_BT = advantages.gae(*batch, discount=discount, lam=lam)
  want_BT = gae_loop(*batch, discount=discount, lam=lam)
  np.testing.assert_allclose(got_BT, want_BT, atol=2e-6)
  np.testing.assert_allclose(
    return_BT, np.where(batch[2], want_BT + batch[1], 0), atol=2e-6
  )


def test_return_on_the_last_token_is_the_target_of_every_token():
  sampled_BT = jnp.array(
    [[False, True, False, True, False], [True, False, False, False, False]]
    + [[False] * 5]
  )
  reward_BT = advantages.on_last_token(jnp.array([0.9, -1.1, 7.0]), sampled_BT)
  want_BT = np.zeros((3, 5), np.float32)
  want_BT[0, 3], want_BT[1, 0] = 0.9, -1.1
  np.testing.assert_array_equal(reward_BT, want_BT)
  _, return_BT = advantages.gae(reward_BT, 0 * reward_BT, sampled_BT)
  want_BT[0, 1] = 0.9
  np.testing.assert_array_equal(return_BT, want_BT)


def test_gae_ignores_what_stands_on_unsampled_tokens():
  reward_BT, value_BT, sampled_BT = ragged(4)
  clean = advantages.gae(reward_BT, value_BT, sampled_BT, lam=0.9)
  for garbage in (7.0, jnp.nan):
    dirty = advantages.gae(
      jnp.where(sampled_BT, reward_BT, garbage),
      jnp.where(sampled_BT, value_BT, garbage),
      sampled_BT,
      lam=0.9,
    )
    np.testing.assert_array_equal(dirty, clean)


def test_gae_does_not_change_with_padding_or_compilation():
  batch = ragged(5)
  padded = [jnp.pad(x, ((0, 1), (0, 6))) for x in batch]
  advantage_BT, return_BT = jax.jit(advantages.gae)(*batch)
  padded_advantage_BT, padded_return_BT = advantages.gae(*padded)
  pad = ((0, 1), (0, 6))
  np.testing.assert_allclose(padded_advantage_BT, np.pad(advantage_BT, pad))
  np.testing.assert_allclose(padded_return_BT, np.pad(return_BT, pad))


def test_gae_gives_the_critic_a_constant_target():
  reward_BT, value_BT, sampled_BT = ragged(0)

  def total(value_BT):
    return sum(map(jnp.sum, advantages.gae(reward_BT, value_BT, sampled_BT)))

  np.testing.assert_array_equal(jax.grad(total)(value_BT), 0 * value_BT)


def test_group_relative_by_hand():
  return_PG = jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]])
  np.testing.assert_allclose(
    advantages.group_relative(return_PG),
    [[-1, 0, 1], [-0.57735, -0.57735, 1.15470]],
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    advantages.group_relative(return_PG, normalize_std=False),
    [[-1, 0, 1], [-1, -1, 2]],
    atol=1e-6,
  )


@pytest.mark.parametrize('normalize_std', [True, False])
@pytest.mark.parametrize('num_members', [1, 3, 7, 16])
def test_equal_returns_give_exactly_zero(num_members, normalize_std):
  """Also those that differ by rounding."""
  compute = jax.jit(advantages.group_relative, static_argnames='normalize_std')
  for value in (-1.1, 0.1, 10.3):
    return_PG = np.full((3, num_members), value, np.float32)
    return_PG[0, 0] = np.nextafter(return_PG[0, 0], np.float32(0))
    assert not np.any(compute(return_PG, normalize_std=normalize_std))


def test_whiten_by_hand():
  # Of 1, 2, 3 the mean is 2 and the unbiased variance 1.
  advantage_BT = jnp.array([[jnp.nan, 1.0, 2.0], [3.0, jnp.nan, 50.0]])
  sampled_BT = jnp.array([[False, True, True], [True, False, False]])
  np.testing.assert_allclose(
    advantages.whiten(advantage_BT, sampled_BT),
    [[0, -1, 0], [1, 0, 0]],
    atol=1e-6,
  )


@pytest.mark.parametrize('count', [0, 1, 17])
def test_whiten_of_equal_advantages_is_zero(count):
  advantage_BT = jnp.full((2, 10), -1.1, jnp.bfloat16)
  sampled_BT = (jnp.arange(20) < count).reshape(2, 10)
  assert not np.any(advantages.whiten(advantage_BT, sampled_BT))


def test_broadcast_puts_one_advantage_on_each_sampled_token():
  sampled_BT = jnp.array([[True, False, True], [False, True, False]])
  advantage_BT = advantages.broadcast(jnp.array([2.0, -1.0]), sampled_BT)
  np.testing.assert_array_equal(advantage_BT, [[2, 0, 2], [0, -1, 0]])
  with pytest.raises(AssertionError):
    advantages.broadcast(jnp.ones(3), sampled_BT)
