"""Token weights and schedules: loops, numbers by hand, what changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import weights


def ragged(seed, shape=(4, 24)):
  """A signal and masks: sampled within random lengths, actions within it."""
  rng = np.random.default_rng(seed)
  length_B1 = rng.integers(shape[1] // 3, shape[1], (shape[0], 1))
  valid_BT = np.arange(shape[1])[None, :] < length_B1
  sampled_BT = valid_BT & (rng.random(shape) < 0.7)
  action_BT = sampled_BT & (rng.random(shape) < 0.3)
  signal_BT = rng.normal(-20, 4, shape).astype(np.float32)
  return jnp.array(signal_BT), jnp.array(sampled_BT), jnp.array(action_BT)


def loop(signal_BT, sampled_BT, action_BT, *, alpha, beta, eps=1e-6):
  """The equation, token by token in float64."""
  signal_BT = np.asarray(signal_BT, np.float64)
  values = [signal_BT[tuple(at)] for at in np.argwhere(action_BT)]
  mean = sum(values) / len(values)
  variance = sum((s - mean) ** 2 for s in values) / len(values)
  weight_BT = np.zeros(signal_BT.shape)
  for at in np.ndindex(signal_BT.shape):
    if action_BT[at]:
      score = (signal_BT[at] - mean) / np.sqrt(variance + eps)
      weight_BT[at] = 1 + beta / (1 + np.exp(-score))
    elif sampled_BT[at]:
      weight_BT[at] = alpha
  return weight_BT


def test_mass_and_stats_by_hand():
  # Actions at -1 and -5: mean -3, deviation 2.
  signal_BT = jnp.array([[9.0, -7.0, -1.0, -5.0, 8.0]])
  weight_BT = jnp.array([[0.0, 0.1, 1.4, 1.1, 0.1]])
  action_BT = jnp.array([[False, False, True, True, False]])
  np.testing.assert_allclose(
    weights.action_mass(weight_BT, action_BT), 2.5 / 2.7, rtol=1e-6
  )
  mean, std = weights.signal_stats(signal_BT, action_BT)
  np.testing.assert_allclose([mean, std], [-3.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize(('alpha', 'beta'), [(0.1, 0.5), (0.0, 2.0)])
def test_against_a_loop(seed, alpha, beta):
  batch = ragged(seed)
  got_BT = jax.jit(weights.token_weights)(*batch, alpha=alpha, beta=beta)
  want_BT = loop(*batch, alpha=alpha, beta=beta)
  np.testing.assert_allclose(got_BT, want_BT, rtol=2e-5)
  assert got_BT.dtype == jnp.float32


def test_uniform_is_one_on_sampled_tokens():
  signal_BT, sampled_BT, action_BT = ragged(0)
  got_BT = weights.token_weights(
    signal_BT, sampled_BT, action_BT, alpha=1.0, beta=0.0
  )
  np.testing.assert_array_equal(got_BT, sampled_BT.astype(jnp.float32))


@pytest.mark.parametrize('alpha', [0.0, 0.1])
def test_no_action_token_leaves_alpha_and_no_nan(alpha):
  signal_BT, sampled_BT, _ = ragged(0)
  none_BT = jnp.zeros_like(sampled_BT)
  got_BT = weights.token_weights(
    signal_BT, sampled_BT, none_BT, alpha=alpha, beta=0.5
  )
  np.testing.assert_array_equal(
    got_BT, np.where(sampled_BT, np.float32(alpha), np.float32(0))
  )
  assert float(weights.action_mass(got_BT, none_BT)) == 0.0
  assert [float(s) for s in weights.signal_stats(signal_BT, none_BT)] == [0, 0]


def test_equal_signals_stand_in_the_middle():
  _, sampled_BT, action_BT = ragged(1)
  signal_BT = jnp.full(sampled_BT.shape, -17.3)
  got_BT = weights.token_weights(
    signal_BT, sampled_BT, action_BT, alpha=0.1, beta=0.5
  )
  np.testing.assert_array_equal(got_BT[action_BT], np.float32(1.25))


def test_what_stands_off_action_tokens_does_not_matter():
  signal_BT, sampled_BT, action_BT = ragged(2)
  garbage_BT = jnp.where(action_BT, signal_BT, jnp.nan)
  assert bool(jnp.isnan(garbage_BT).any())
  scale = dict(alpha=0.1, beta=0.5)
  np.testing.assert_array_equal(
    weights.token_weights(garbage_BT, sampled_BT, action_BT, **scale),
    weights.token_weights(signal_BT, sampled_BT, action_BT, **scale),
  )


def test_weights_are_constants_for_differentiation():
  signal_BT, sampled_BT, action_BT = ragged(0)

  def total(signal_BT):
    weight_BT = weights.token_weights(
      signal_BT, sampled_BT, action_BT, alpha=0.1, beta=0.5
    )
    return jnp.sum(jnp.square(weight_BT))

  np.testing.assert_array_equal(jax.grad(total)(signal_BT), 0.0 * signal_BT)


top_entropy = jax.jit(weights.top_entropy, static_argnames='share')


def entropies(seed, count):
  """`count` sampled tokens of unlike entropy among unsampled NaN."""
  rng = np.random.default_rng(seed)
  sampled_BT = (rng.permutation(4 * 40) < count).reshape(4, 40)
  entropy_BT = rng.permutation(4 * 40).reshape(4, 40) / 64
  entropy_BT = np.where(sampled_BT, entropy_BT, np.nan).astype(np.float32)
  return jnp.array(entropy_BT), jnp.array(sampled_BT)


@pytest.mark.parametrize('count', [1, 2, 33, 118])
@pytest.mark.parametrize('share', [0.2, 0.5])
def test_top_entropy_keeps_the_share_of_the_most_uncertain(count, share):
  entropy_BT, sampled_BT = entropies(count, count)
  weight_BT = np.asarray(top_entropy(entropy_BT, sampled_BT, share=share))
  assert weight_BT.dtype == np.float32
  assert set(np.unique(weight_BT)) <= {0.0, 1.0}
  # Those at or above a place among `count - 1` gaps.
  kept = count - int(np.ceil(round((1 - share) * (count - 1), 6)))
  assert abs(kept - share * count) <= 1
  assert kept == weight_BT.sum()
  ranked = np.sort(np.asarray(entropy_BT)[np.asarray(sampled_BT)])
  chosen = np.sort(np.asarray(entropy_BT)[weight_BT > 0])
  np.testing.assert_array_equal(chosen, ranked[count - kept :])


def test_top_entropy_keeps_all_of_a_tie():
  # The eight highest of ten are alike; 0.2 of them cannot be told apart.
  entropy_BT = jnp.array([[0.1, 0.7, 0.7, 0.7, 0.7], [0.7, 0.7, 0.7, 0.7, 0.2]])
  sampled_BT = jnp.ones((2, 5), bool)
  np.testing.assert_array_equal(
    top_entropy(entropy_BT, sampled_BT), entropy_BT > 0.5
  )


def test_top_entropy_of_nothing_is_zero():
  entropy_BT, sampled_BT = entropies(0, 0)
  weight_BT = top_entropy(entropy_BT, sampled_BT)
  np.testing.assert_array_equal(weight_BT, np.zeros((4, 40)))


def test_top_entropy_is_a_constant_and_does_not_mind_padding():
  entropy_BT, sampled_BT = entropies(1, 50)
  padded = [jnp.pad(x, ((0, 1), (0, 9))) for x in (entropy_BT, sampled_BT)]
  np.testing.assert_array_equal(
    top_entropy(*padded),
    np.pad(top_entropy(entropy_BT, sampled_BT), ((0, 1), (0, 9))),
  )
  gradient_BT = jax.grad(lambda x: jnp.sum(x * top_entropy(x, sampled_BT)))(
    jnp.where(sampled_BT, entropy_BT, 0.0)
  )
  np.testing.assert_array_equal(
    gradient_BT, top_entropy(entropy_BT, sampled_BT)
  )


def at_step(step, start=1.0, end=0.1, steps=4):
  return weights.schedule(start, end, steps=steps, step=jnp.int32(step))


def test_schedule_by_hand():
  steps = {0: 1.0, 1: 0.775, 2: 0.55, 4: 0.1, 900: 0.1}
  for step, want in steps.items():
    got = at_step(step)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got.dtype == jnp.float32 and got.shape == ()


def test_schedule_without_end_or_without_way():
  for step in (0, 3, 900):
    assert at_step(step, 0.3, None) == np.float32(0.3)
    assert at_step(step, 0.3, None, 0) == np.float32(0.3)
    assert at_step(step, 0.3, 0.7, 0) == np.float32(0.7)
  assert at_step(0, 0.3, 0.7, 1) == np.float32(0.3)
  assert at_step(1, 0.3, 0.7, 1) == np.float32(0.7)


@pytest.mark.parametrize('step', [0, 3, 11])
@pytest.mark.parametrize('moving', ['alpha', 'beta', 'neither'])
def test_by_action_weighs_with_the_numbers_of_its_step(step, moving):
  """From 0.1 and 0.5 to 0.9 within 8 steps, or not at all."""
  signal_BT, sampled_BT, action_BT = ragged(0)
  inputs = weights.WeightInputs(
    signal_BT, 0 * signal_BT, sampled_BT, action_BT, jnp.int32(step)
  )
  ends, numbers = {}, dict(alpha=0.1, beta=0.5)
  if moving != 'neither':
    ends = {f'{moving}_end': 0.9, 'schedule_steps': 8}
  got_BT = weights.by_action(inputs, **numbers, **ends)
  if moving != 'neither':
    numbers[moving] += min(step / 8, 1) * (0.9 - numbers[moving])
  want_BT = loop(signal_BT, sampled_BT, action_BT, **numbers)
  np.testing.assert_allclose(got_BT, want_BT, rtol=1e-4)
