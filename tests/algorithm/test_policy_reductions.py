"""Reductions of the policy loss: over tokens, or over each row and all rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import losses, trajectory

CLIP = dict(clip_low=0.2, clip_high=0.28)
DUAL = 1.5
TOKENS, ROWS = losses.REDUCTIONS
NAMES = ('logprob', 'old_logprob', 'advantage', 'weight')


def ragged(seed, shape=(8, 20)):
  """Unequal rows and weights, row 3 without any weight, float32."""
  rng = np.random.default_rng(seed)
  length_B1 = rng.integers(4, shape[1] + 1, (shape[0], 1))
  sampled_BT = np.arange(shape[1])[None, :] < length_B1
  sampled_BT &= rng.random(shape) < 0.7
  sampled_BT[3] = False
  old_BT = -rng.exponential(size=shape)
  batch_NBT = (
    old_BT + rng.normal(scale=0.6, size=shape),
    old_BT,
    rng.normal(size=shape),
    sampled_BT * rng.choice([0.1, 1.0, 1.4], shape),
  )
  return [x_BT.astype(np.float32) for x_BT in batch_NBT]


@functools.partial(jax.jit, static_argnames='reduction')
def compute(*batch, **numbers):
  return losses.policy_loss(*batch, **CLIP, dual_clip=DUAL, **numbers)[0]


@functools.partial(jax.jit, static_argnames='reduction')
def slope(*batch, **numbers):
  return jax.grad(lambda *x: trajectory.divide(*compute(*x, **numbers)))(*batch)


def region(ratio, gain):
  """Which part of the objective a token is in, from its equation."""
  if gain > 0 and ratio > 1.28:
    return 'above'
  if gain < 0 and ratio < 0.8:
    return 'below'
  if gain < 0 and ratio > DUAL:
    return 'dual'
  return 'free'


def surrogate(ratio, gain):
  bound = {'above': 1.28, 'below': 0.8, 'dual': DUAL, 'free': ratio}
  return bound[region(ratio, gain)] * gain


def loop(batch, reduction, importance_BT=None):
  """The loss, its gradient in closed form, and the regions met; float64."""
  new_BT, old_BT, gain_BT, weight_BT = (np.asarray(x, float) for x in batch)
  weight_B = [sum(weight_T) for weight_T in weight_BT]
  heavy = sum(weight > 0 for weight in weight_B)
  loss, gradient_BT, regions = 0.0, np.zeros(new_BT.shape), set()
  for at in map(tuple, np.argwhere(weight_BT > 0)):
    share = weight_BT[at] / sum(weight_B)
    if reduction == ROWS:
      share = weight_BT[at] / weight_B[at[0]] / heavy
    if importance_BT is not None:
      share *= importance_BT[at]
    ratio = np.exp(new_BT[at] - old_BT[at])
    loss -= share * surrogate(ratio, gain_BT[at])
    where = region(ratio, gain_BT[at])
    regions.add(where)
    if where == 'free':
      gradient_BT[at] = -share * ratio * gain_BT[at]
  return loss, gradient_BT, regions


def test_by_hand():
  # Ratios of 1; weighted gains 1 + 3 * 5 of weight 4, and 2 of weight 1.
  zero_BT = jnp.zeros((3, 2))
  gain_BT = jnp.array([[1.0, 5.0], [2.0, 9.0], [9.0, 9.0]])
  weight_BT = jnp.array([[1.0, 3.0], [1.0, 0.0], [0.0, 0.0]])
  batch = (zero_BT, zero_BT, gain_BT, weight_BT)
  np.testing.assert_allclose(compute(*batch, reduction=TOKENS), (-18, 5))
  np.testing.assert_allclose(compute(*batch, reduction=ROWS), (-4 - 2, 2))
  np.testing.assert_allclose(compute(*batch), (-18, 5))


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('reduction', losses.REDUCTIONS)
def test_loss_and_gradient_against_the_closed_form(seed, reduction):
  batch = ragged(seed)
  want, want_BT, regions = loop(batch, reduction)
  assert regions == {'above', 'below', 'dual', 'free'}
  total, count = compute(*batch, reduction=reduction)
  np.testing.assert_allclose(total / count, want, rtol=1e-5, atol=1e-6)
  gradient_BT = slope(*batch, reduction=reduction)
  np.testing.assert_allclose(gradient_BT, want_BT, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('reduction', losses.REDUCTIONS)
def test_importance_is_a_factor_and_in_no_denominator(seed, reduction):
  batch = ragged(seed)
  rng = np.random.default_rng(seed)
  importance_BT = rng.exponential(size=batch[0].shape).astype(np.float32)
  want, want_BT, _ = loop(batch, reduction, importance_BT)
  assert abs(want - loop(batch, reduction)[0]) > 1e-3
  numbers = dict(reduction=reduction, importance_BT=importance_BT)
  total, count = compute(*batch, **numbers)
  np.testing.assert_allclose(total / count, want, rtol=1e-5, atol=1e-6)
  assert count == compute(*batch, reduction=reduction)[1]
  np.testing.assert_allclose(
    slope(*batch, **numbers), want_BT, rtol=1e-4, atol=1e-8
  )


@pytest.mark.parametrize('reduction', losses.REDUCTIONS)
def test_importance_of_one_changes_nothing_and_has_no_gradient(reduction):
  batch = ragged(0)
  ones_BT = jnp.ones_like(batch[0])
  np.testing.assert_array_equal(
    compute(*batch, reduction=reduction, importance_BT=ones_BT),
    compute(*batch, reduction=reduction),
  )

  def loss(importance_BT):
    numbers = dict(reduction=reduction, importance_BT=importance_BT)
    return compute(*batch, **numbers)[0]

  assert not np.any(jax.grad(loss)(ones_BT))


@pytest.mark.parametrize('reduction', losses.REDUCTIONS)
def test_only_the_new_logprobs_receive_a_gradient(reduction):
  def loss(*batch):
    return trajectory.divide(*compute(*batch, reduction=reduction))

  gradients = jax.grad(loss, range(4))(*ragged(1))
  got = dict(zip(NAMES, gradients, strict=True))
  assert np.any(got.pop('logprob'))
  for name, gradient_BT in got.items():
    assert not np.any(gradient_BT), name


def test_the_two_agree_on_one_row_and_on_like_rows():
  batch = ragged(0)
  one = [x_BT[:1] for x_BT in batch]
  like = [np.tile(x_BT[:1], (3, 1)) for x_BT in batch]
  like[0] = like[0] + np.array([[0.0], [0.4], [-0.4]], np.float32)
  for part in (one, like):
    means = [
      trajectory.divide(*compute(*part, reduction=r)) for r in (TOKENS, ROWS)
    ]
    np.testing.assert_allclose(*means, rtol=1e-5)
  means = [
    trajectory.divide(*compute(*batch, reduction=r)) for r in (TOKENS, ROWS)
  ]
  assert abs(means[0] - means[1]) > 1e-3


@pytest.mark.parametrize('reduction', losses.REDUCTIONS)
def test_micro_batches_of_rows_add_up(reduction):
  batch = ragged(2)
  parts = [
    compute(*(x_BT[i : i + 2] for x_BT in batch), reduction=reduction)
    for i in range(0, 8, 2)
  ]
  np.testing.assert_allclose(
    np.sum(parts, axis=0), compute(*batch, reduction=reduction), rtol=1e-5
  )


@pytest.mark.parametrize('reduction', losses.REDUCTIONS)
def test_the_denominator_is_the_count_of_the_loss(reduction):
  batch = ragged(0)
  want = batch[3].sum() if reduction == TOKENS else 7
  got = losses.denominator(jnp.array(batch[3]), reduction=reduction)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(compute(*batch, reduction=reduction)[1], got)
  none_BT = jnp.zeros((2, 3))
  assert losses.denominator(none_BT, reduction=reduction) == 0
  batch[3] = 0 * batch[3]
  assert not np.any(compute(*batch, reduction=reduction))
  assert not np.any(slope(*batch, reduction=reduction))


def test_an_unknown_reduction_is_an_error():
  x_BT = jnp.zeros((1, 1))
  with pytest.raises(ValueError, match='sequence_mean_token_mean'):
    losses.denominator(x_BT, reduction='mean')
  with pytest.raises(ValueError, match='sequence_mean_token_mean'):
    losses.policy_loss(*[x_BT] * 4, **CLIP, reduction='mean')
