"""Advantages: goldens, loops in float64, and reductions to known cases."""

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


def test_gae_by_hand_passes_through_an_observation():
  # Sampled at 1, 2 and 4; the value of the observation at 3 is not read.
  reward_BT = jnp.array([[0.0, 0.0, 1.0, 0.0, 2.0]])
  value_BT = jnp.array([[9.0, 0.5, 1.0, 99.0, 1.5]])
  sampled_BT = jnp.array([[False, True, True, False, True]])
  advantage_BT, return_BT = advantages.gae(
    reward_BT, value_BT, sampled_BT, discount=0.5, lam=0.5
  )
  # t=4: 2 - 1.5 = 0.5.  t=2: 1 + 0.75 - 1 + 0.25 * 0.5 = 0.875.
  # t=1: 0 + 0.5 - 0.5 + 0.25 * 0.875 = 0.21875.
  np.testing.assert_allclose(advantage_BT, [[0, 0.21875, 0.875, 0, 0.5]])
  np.testing.assert_allclose(return_BT, [[0, 0.71875, 1.875, 0, 2.0]])


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize(('discount', 'lam'), [(1, 1), (0.9, 0.7), (1, 0)])
def test_gae_against_a_loop(seed, discount, lam):
  batch = ragged(seed)
  got_BT, return_BT = advantages.gae(*batch, discount=discount, lam=lam)
  want_BT = gae_loop(*batch, discount=discount, lam=lam)
  np.testing.assert_allclose(got_BT, want_BT, atol=2e-6)
  np.testing.assert_allclose(
    return_BT, np.where(batch[2], want_BT + batch[1], 0), atol=2e-6
  )


def test_gae_with_lambda_one_is_return_to_go_minus_value():
  reward_BT, value_BT, sampled_BT = ragged(3)
  to_go_BT = np.cumsum(np.asarray(reward_BT)[:, ::-1], axis=1)[:, ::-1]
  advantage_BT, return_BT = advantages.gae(reward_BT, value_BT, sampled_BT)
  np.testing.assert_allclose(
    advantage_BT, np.where(sampled_BT, to_go_BT - value_BT, 0), atol=2e-6
  )
  np.testing.assert_allclose(
    return_BT, np.where(sampled_BT, to_go_BT, 0), atol=2e-6
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
  for value in (-1.1, 0.1, 10.3):
    return_PG = jnp.full((3, num_members), value, jnp.float32)
    advantage_PG = jax.jit(
      advantages.group_relative, static_argnames='normalize_std'
    )(return_PG, normalize_std=normalize_std)
    np.testing.assert_array_equal(advantage_PG, np.zeros((3, num_members)))


def test_returns_that_differ_by_rounding_give_exactly_zero():
  value = np.float32(-1.1)
  near = np.nextafter(value, np.float32(0))
  assert near != value
  advantage_PG = advantages.group_relative(jnp.array([[value, near]]))
  np.testing.assert_array_equal(advantage_PG, [[0, 0]])


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
  white_BT = advantages.whiten(advantage_BT, sampled_BT)
  np.testing.assert_array_equal(white_BT, np.zeros((2, 10)))


def test_broadcast_puts_one_advantage_on_each_sampled_token():
  sampled_BT = jnp.array([[True, False, True], [False, True, False]])
  advantage_BT = advantages.broadcast(jnp.array([2.0, -1.0]), sampled_BT)
  np.testing.assert_array_equal(advantage_BT, [[2, 0, 2], [0, -1, 0]])
  with pytest.raises(AssertionError):
    advantages.broadcast(jnp.ones(3), sampled_BT)
