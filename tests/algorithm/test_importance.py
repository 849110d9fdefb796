"""Importance weights and the sample size that is left: hand, loop, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import losses


def ragged(seed, shape=(5, 11)):
  rng = np.random.default_rng(seed)
  old_BT = -rng.exponential(size=shape).astype(np.float32)
  sampler_BT = old_BT + rng.normal(size=shape).astype(np.float32)
  return old_BT, sampler_BT, rng.random(shape) < 0.6


def test_importance_by_hand():
  # Ratios 0.5, 2 and 8, the last one capped; then one that was not sampled.
  old_BT = jnp.log(jnp.array([[0.2, 0.8, 0.8, 0.5]]))
  sampler_BT = jnp.log(jnp.array([[0.4, 0.4, 0.1, 0.1]]))
  sampled_BT = jnp.array([[True, True, True, False]])
  importance_BT = losses.importance_weights(
    old_BT, sampler_BT, sampled_BT, cap=3.0
  )
  np.testing.assert_allclose(importance_BT, [[0.5, 2, 3, 1]], rtol=1e-6)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('cap', [1.0, 2.0, 1e9])
def test_importance_against_a_loop(seed, cap):
  old_BT, sampler_BT, sampled_BT = ragged(seed)
  want_BT = np.ones(old_BT.shape)
  for at in map(tuple, np.argwhere(sampled_BT)):
    ratio = np.exp(float(old_BT[at]) - float(sampler_BT[at]))
    want_BT[at] = min(ratio, cap)
  got_BT = losses.importance_weights(
    jnp.array(old_BT), jnp.array(sampler_BT), jnp.array(sampled_BT), cap=cap
  )
  np.testing.assert_allclose(got_BT, want_BT, rtol=1e-5)
  assert got_BT.dtype == jnp.float32
  assert (want_BT == cap).any() == (cap < 1e9)


def test_importance_is_one_off_the_mask_whatever_the_cap():
  zero_BT = jnp.zeros((1, 2))
  sampled_BT = jnp.array([[True, False]])
  importance_BT = losses.importance_weights(
    zero_BT, zero_BT, sampled_BT, cap=0.5
  )
  np.testing.assert_array_equal(importance_BT, [[0.5, 1.0]])


def test_importance_is_finite_for_tokens_far_apart_and_for_garbage():
  old_BT = jnp.array([[0.0, -500.0, jnp.nan]])
  sampler_BT = jnp.array([[-500.0, 0.0, jnp.inf]])
  sampled_BT = jnp.array([[True, True, False]])
  importance_BT = losses.importance_weights(
    old_BT, sampler_BT, sampled_BT, cap=5.0
  )
  np.testing.assert_allclose(importance_BT, [[5, 0, 1]], atol=1e-8)


def test_no_gradient_enters_the_importance_weights():
  old_BT, sampler_BT, sampled_BT = map(jnp.array, ragged(1))

  def total(old_BT, sampler_BT):
    weight_BT = losses.importance_weights(
      old_BT, sampler_BT, sampled_BT, cap=9.0
    )
    return jnp.sum(jnp.square(weight_BT))

  gradients = jax.grad(total, (0, 1))(old_BT, sampler_BT)
  assert not np.any(gradients)


def sample_size(logprob_BT, other_BT, sampled_BT):
  return float(
    losses.effective_sample_size(
      jnp.array(logprob_BT), jnp.array(other_BT), jnp.array(sampled_BT)
    )
  )


def test_sample_size_by_hand():
  # Ratios 1 and 3: 16 / (2 * 10).
  size = sample_size(
    np.log([[1.0, 3.0, 50.0]]).astype(np.float32),
    np.zeros((1, 3), np.float32),
    [[True, True, False]],
  )
  np.testing.assert_allclose(size, 0.8, rtol=1e-6)


@pytest.mark.parametrize('seed', range(3))
def test_sample_size_against_a_loop(seed):
  batch = ragged(seed)
  ratios = [
    np.exp(float(batch[0][at]) - float(batch[1][at]))
    for at in map(tuple, np.argwhere(batch[2]))
  ]
  squares = sum(ratio**2 for ratio in ratios)
  want = sum(ratios) ** 2 / (len(ratios) * squares)
  assert want < 0.9
  np.testing.assert_allclose(sample_size(*batch), want, rtol=1e-5)


@pytest.mark.parametrize('log_ratio', [-15.0, -3.0, 0.0, 2.0, 15.0])
def test_sample_size_of_equal_ratios_is_all_of_it(log_ratio):
  _, other_BT, sampled_BT = ragged(0)
  other_BT = np.zeros_like(other_BT)
  size = sample_size(other_BT + np.float32(log_ratio), other_BT, sampled_BT)
  np.testing.assert_allclose(size, 1.0, rtol=1e-5)


def test_sample_size_of_nothing_and_of_garbage():
  nan_BT = np.full((1, 2), np.nan, np.float32)
  assert sample_size(nan_BT, nan_BT, [[False, False]]) == 0
  half_BT = np.array([[0.0, np.nan]], np.float32)
  assert sample_size(half_BT, half_BT, [[True, False]]) == 1
