"""Losses: goldens, loops in float64, gradients by region, micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import losses, trajectory, weights

CLIP = dict(clip_low=0.2, clip_high=0.28)


def ragged(seed, shape=(8, 20)):
  """Log-probabilities, advantages, weights and masks of unequal rows."""
  rng = np.random.default_rng(seed)
  length_B1 = rng.integers(4, shape[1] + 1, (shape[0], 1))
  sampled_BT = np.arange(shape[1])[None, :] < length_B1
  sampled_BT &= rng.random(shape) < 0.7
  action_BT = sampled_BT & (rng.random(shape) < 0.3)
  old_BT = -rng.exponential(size=shape)
  batch = {
    'logprob_BT': old_BT + rng.normal(scale=0.6, size=shape),
    'old_logprob_BT': old_BT,
    'advantage_BT': rng.normal(size=shape),
  }
  batch = {name: jnp.array(x, jnp.float32) for name, x in batch.items()}
  batch['weight_BT'] = weights.token_weights(
    jnp.array(rng.normal(size=shape), jnp.float32),
    jnp.array(sampled_BT),
    jnp.array(action_BT),
    alpha=0.1,
    beta=0.5,
  )
  batch['sampled_BT'] = jnp.array(sampled_BT)
  return batch


def mean_loss(*args, **kwargs):
  pair, _ = losses.policy_loss(*args, **kwargs)
  return trajectory.divide(*pair)


def policy_loop(batch, *, clip_low, clip_high, dual_clip=None):
  """The objective and its metrics, token by token in float64."""
  total = count = clipped = dual = kl = num_tokens = ratio_max = 0.0
  x = {name: np.asarray(value, np.float64) for name, value in batch.items()}
  for at in np.argwhere(np.asarray(batch['sampled_BT'])):
    at = tuple(at)
    new, old, gain = (
      x[k][at] for k in ('logprob_BT', 'old_logprob_BT', 'advantage_BT')
    )
    ratio = np.exp(new - old)
    bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
    surrogate = min(ratio * gain, bounded * gain)
    clipped += bounded * gain < ratio * gain
    if dual_clip is not None and gain < 0 and surrogate < dual_clip * gain:
      surrogate = dual_clip * gain
      dual += 1
    total -= x['weight_BT'][at] * surrogate
    count += x['weight_BT'][at]
    kl += ratio - 1 - (new - old)
    ratio_max = max(ratio_max, ratio)
    num_tokens += 1
  return {
    'total': total,
    'count': count,
    'clip_fraction': clipped / num_tokens,
    'dual_clip_fraction': dual / num_tokens,
    'approx_kl': kl / num_tokens,
    'ratio_max': ratio_max,
  }


def test_policy_loss_by_hand():
  # Ratios 1, 2 (clipped to 1.28), 0.5 (clipped to 0.8) and one not sampled.
  ratio_BT = jnp.array([[1.0, 2.0, 0.5, 7.0]])
  pair, metrics = losses.policy_loss(
    jnp.log(ratio_BT),
    jnp.zeros((1, 4)),
    jnp.array([[3.0, 1.0, -1.0, 100.0]]),
    jnp.array([[0.1, 1.5, 1.0, 0.0]]),
    **CLIP,
  )
  np.testing.assert_allclose(pair, (-(0.3 + 1.5 * 1.28 - 0.8), 2.6), rtol=1e-6)
  np.testing.assert_allclose(metrics['clip_fraction'], (2, 3))
  np.testing.assert_allclose(metrics['dual_clip_fraction'], (0, 3))
  np.testing.assert_allclose(metrics['ratio_max'], 2.0, rtol=1e-6)
  np.testing.assert_allclose(  # r - 1 - log r, summed
    metrics['approx_kl'], (1 - np.log(2) + np.log(2) - 0.5, 3), rtol=1e-6
  )


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('dual_clip', [None, 1.5])
def test_policy_loss_against_a_loop(seed, dual_clip):
  batch = ragged(seed)
  compute = functools.partial(losses.policy_loss, **CLIP, dual_clip=dual_clip)
  (total, count), metrics = jax.jit(compute)(**batch)
  want = policy_loop(batch, **CLIP, dual_clip=dual_clip)
  np.testing.assert_allclose(total, want['total'], rtol=1e-5)
  np.testing.assert_allclose(count, want['count'], rtol=1e-6)
  assert want['clip_fraction'] > 0
  assert (want['dual_clip_fraction'] > 0) == (dual_clip is not None)
  for name in ('clip_fraction', 'dual_clip_fraction', 'approx_kl'):
    np.testing.assert_allclose(
      trajectory.divide(*metrics[name]), want[name], rtol=1e-5, err_msg=name
    )
  np.testing.assert_allclose(metrics['ratio_max'], want['ratio_max'], rtol=1e-5)


# ratio, advantage, dual clip, whether the gradient -w r A / sum w gets through
REGIONS = [
  (1.0, 2.0, None, True),
  (1.0, -2.0, None, True),
  (1.2, 2.0, None, True),
  (1.2, -2.0, None, True),
  (1.4, 2.0, None, False),
  (1.4, -2.0, None, True),
  (0.7, 2.0, None, True),
  (0.7, -2.0, None, False),
  (4.0, -2.0, None, True),
  (4.0, -2.0, 3.0, False),
  (4.0, 2.0, 3.0, False),
  (2.9, -2.0, 3.0, True),
  (0.7, -2.0, 3.0, False),
  (0.1, 2.0, 3.0, True),
]


@pytest.mark.parametrize(('ratio', 'gain', 'dual_clip', 'passes'), REGIONS)
def test_gradient_by_region_of_the_clip(ratio, gain, dual_clip, passes):
  logprob_BT = jnp.full((1, 2), np.log(ratio) - 1.0, jnp.float32)
  loss = functools.partial(mean_loss, **CLIP, dual_clip=dual_clip)
  gradient_BT = jax.jit(jax.grad(loss))(
    logprob_BT,
    jnp.full((1, 2), -1.0),
    jnp.array([[gain, 0.0]]),
    jnp.array([[0.5, 1.5]]),
  )
  want = -0.25 * ratio * gain if passes else 0.0
  np.testing.assert_allclose(gradient_BT, [[want, 0.0]], rtol=1e-5)


@pytest.mark.parametrize('name', ['logprob', 'old_logprob', 'advantage'])
def test_nan_on_unsampled_tokens_reaches_nothing(name):
  batch = ragged(2)
  compute = jax.value_and_grad(
    lambda logprob_BT, batch: mean_loss(logprob_BT, **batch, **CLIP)
  )

  def run(batch):
    batch = dict(batch)
    return compute(batch.pop('logprob_BT'), batch)

  dirty = dict(batch)
  dirty[f'{name}_BT'] = jnp.where(
    batch['sampled_BT'], batch[f'{name}_BT'], jnp.nan
  )
  jax.tree.map(np.testing.assert_array_equal, run(dirty), run(batch))


def test_alpha_zero_trains_actions_and_counts_all_sampled_tokens():
  batch = ragged(3)
  action_BT = batch['weight_BT'] > 1
  batch['weight_BT'] = jnp.where(action_BT, batch['weight_BT'], 0.0)
  num_sampled = int(batch['sampled_BT'].sum())
  num_actions = int(action_BT.sum())
  assert 0 < num_actions < num_sampled
  _, metrics = losses.policy_loss(**batch, **CLIP)
  assert float(metrics['clip_fraction'][1]) == num_sampled
  batch.pop('sampled_BT')
  _, metrics = losses.policy_loss(**batch, **CLIP)
  assert float(metrics['clip_fraction'][1]) == num_actions


def test_no_weight_at_all_is_zero_and_not_nan():
  batch = ragged(3)
  batch['weight_BT'] = jnp.zeros_like(batch['weight_BT'])
  batch['sampled_BT'] = jnp.zeros_like(batch['sampled_BT'])
  logprob_BT = batch.pop('logprob_BT')
  value, gradient_BT = jax.value_and_grad(mean_loss)(
    logprob_BT, **batch, **CLIP
  )
  assert float(value) == 0.0
  np.testing.assert_array_equal(gradient_BT, 0 * logprob_BT)
  _, metrics = losses.policy_loss(logprob_BT, **batch, **CLIP)
  assert all(np.all(np.isfinite(m)) for m in jax.tree.leaves(metrics))


def test_log_ratio_is_bounded_at_twenty():
  ones_BT = jnp.ones((1, 1))
  (total, _), _ = losses.policy_loss(
    200 * ones_BT, 0 * ones_BT, -ones_BT, ones_BT, **CLIP
  )
  np.testing.assert_allclose(total, np.exp(20.0), rtol=1e-5)


def test_dual_clip_of_one_or_less_is_an_error():
  batch = ragged(0)
  with pytest.raises(ValueError, match='dual_clip'):
    losses.policy_loss(**batch, **CLIP, dual_clip=1.0)


def every_term(batch):
  """All loss terms of one (micro-)batch as a tree of (sum, count) pairs."""
  policy, metrics = losses.policy_loss(**batch, **CLIP, dual_clip=3.0)
  metrics.pop('ratio_max')
  new_BT, old_BT = batch['logprob_BT'], batch['old_logprob_BT']
  sampled_BT = batch['sampled_BT']
  value, value_metrics = losses.value_loss(
    new_BT, old_BT, batch['advantage_BT'], sampled_BT, clip=0.5
  )
  return {
    'policy': policy,
    'value': value,
    'kl': losses.kl(new_BT, old_BT, sampled_BT, estimator='k3'),
    'entropy': losses.entropy_bonus(-new_BT, sampled_BT),
    'metrics': (metrics, value_metrics),
  }


def test_sums_over_micro_batches_are_those_of_the_mini_batch():
  batch = ragged(4)
  compute = jax.jit(every_term)
  whole = compute(batch)
  means = []
  for num_parts in (2, 8):
    parts = [
      jax.tree.map(lambda x: jnp.split(x, num_parts)[i], batch)  # noqa: B023
      for i in range(num_parts)
    ]
    terms = [compute(part) for part in parts]
    added = jax.tree.map(lambda *x: sum(x), *terms)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
      added,
      whole,
    )
    means.append(np.mean([trajectory.divide(*t['policy']) for t in terms]))
  # The mean of means, the wrong objective, is another number here.
  exact = float(trajectory.divide(*whole['policy']))
  assert abs(means[1] - exact) > 1e-3


def test_padding_changes_no_term():
  batch = ragged(6)
  padded = {k: jnp.pad(x, ((0, 2), (0, 7))) for k, x in batch.items()}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
    jax.jit(every_term)(padded),
    jax.jit(every_term)(batch),
  )


def test_terms_are_float32_from_bfloat16_inputs():
  batch = {
    k: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
    for k, x in ragged(0).items()
  }
  shapes = jax.eval_shape(every_term, batch)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}


def test_value_loss_by_hand():
  # Old values 0, clip 0.5. Errors: inside the clip; past it, where the clipped
  # error is the larger; past it on the far side; and one not sampled.
  value_BT = jnp.array([[0.3, 2.0, -2.0, 9.0]])
  return_BT = jnp.array([[1.0, 2.0, 1.0, 0.0]])
  sampled_BT = jnp.array([[True, True, True, False]])

  def loss(value_BT):
    return losses.value_loss(
      value_BT, jnp.zeros((1, 4)), return_BT, sampled_BT, clip=0.5
    )

  (total, count), metrics = loss(value_BT)
  np.testing.assert_allclose(total, 0.5 * (0.49 + 2.25 + 9.0), rtol=1e-6)
  assert float(count) == 3
  np.testing.assert_array_equal(metrics['clip_fraction'], (1, 3))
  gradient_BT = jax.grad(lambda v: loss(v)[0][0])(value_BT)
  np.testing.assert_allclose(gradient_BT, [[-0.7, 0, -3, 0]], rtol=1e-6)


def test_only_values_of_sampled_tokens_receive_gradients():
  rng = np.random.default_rng(1)
  sampled_BT = jnp.array(rng.random((3, 7)) < 0.5)
  x_NBT = jnp.array(rng.normal(size=(3, 3, 7)), jnp.float32)
  dirty_NBT = jnp.where(sampled_BT[None], x_NBT, jnp.nan)

  def total(*x_BT):
    return losses.value_loss(*x_BT, sampled_BT, clip=0.2)[0][0]

  value, gradients = jax.value_and_grad(total, (0, 1, 2))(*dirty_NBT)
  np.testing.assert_allclose(value, total(*x_NBT), rtol=1e-6)
  value_BT, old_BT, return_BT = np.asarray(x_NBT)
  near_BT = np.clip(value_BT, old_BT - 0.2, old_BT + 0.2)
  free_BT = np.abs(value_BT - return_BT) >= np.abs(near_BT - return_BT)
  want_BT = np.where(sampled_BT & free_BT, value_BT - return_BT, 0)
  np.testing.assert_allclose(gradients[0], want_BT, rtol=1e-6)
  assert not np.any(gradients[1:])


@pytest.mark.parametrize(
  ('estimator', 'want', 'slope'),
  [
    ('k1', 0.5, 1.0),
    ('k2', 0.125, 0.5),
    ('k3', np.exp(-0.5) - 0.5, 1 - np.exp(-0.5)),
  ],
)
def test_kl_and_its_gradient_by_hand(estimator, want, slope):
  logprob_BT = jnp.array([[-1.0, -1.0, -5.0]])
  ref_BT = jnp.array([[-1.5, -1.0, 0.0]])
  sampled_BT = jnp.array([[True, True, False]])

  def compute(logprob_BT, ref_BT):
    return losses.kl(logprob_BT, ref_BT, sampled_BT, estimator=estimator)

  pair, gradients = jax.value_and_grad(compute, (0, 1), has_aux=True)(
    logprob_BT, ref_BT
  )
  np.testing.assert_allclose(pair, (want, 2), rtol=1e-6)
  at_zero = 1.0 if estimator == 'k1' else 0.0
  np.testing.assert_allclose(gradients[0], [[slope, at_zero, 0]], rtol=1e-6)
  assert not np.any(gradients[1])


def test_kl_estimates_are_of_the_divergence():
  # Tokens in the proportions of the policy make the estimates exact sums.
  policy_V = np.array([0.5, 0.25, 0.25])
  reference_V = np.array([0.25, 0.5, 0.25])
  tokens_BT = np.array([[0, 0, 1, 2]])
  sampled_BT = jnp.ones((1, 4), bool)
  want = (policy_V * np.log(policy_V / reference_V)).sum()
  for estimator in ('k1', 'k3'):
    pair = losses.kl(
      jnp.array(np.log(policy_V)[tokens_BT], jnp.float32),
      jnp.array(np.log(reference_V)[tokens_BT], jnp.float32),
      sampled_BT,
      estimator=estimator,
    )
    np.testing.assert_allclose(trajectory.divide(*pair), want, rtol=1e-6)


@pytest.mark.parametrize(
  ('estimator', 'want'), [('k1', -20.0), ('k2', 200.0), ('k3', 10.0)]
)
def test_kl_is_bounded(estimator, want):
  far_BT = jnp.full((1, 1), -300.0)
  total, _ = losses.kl(far_BT, 0 * far_BT, far_BT < 0, estimator=estimator)
  assert float(total) == want


def test_unknown_estimator_is_an_error():
  x_BT = jnp.zeros((1, 1))
  with pytest.raises(ValueError, match='k1'):
    losses.kl(x_BT, x_BT, x_BT == 0, estimator='k4')


def test_entropy_bonus_is_the_plain_sum_over_sampled_tokens():
  entropy_BT = jnp.array([[1.0, 2.0, 4.0]])
  sampled_BT = jnp.array([[True, False, True]])
  np.testing.assert_array_equal(
    losses.entropy_bonus(entropy_BT, sampled_BT), (5.0, 2.0)
  )
