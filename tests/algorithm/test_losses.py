"""Losses: a loop in float64 with the gradient in closed form, limits, parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import losses, trajectory

CLIP = dict(clip_low=0.2, clip_high=0.28)
DUAL = 1.5
TOKENS, ROWS = losses.REDUCTIONS


def ragged(seed, shape=(8, 20)):
  """Log-probs, advantages, weights, masks; row 3 has no sampled token."""
  rng = np.random.default_rng(seed)
  length_B1 = rng.integers(4, shape[1] + 1, (shape[0], 1))
  sampled_BT = np.arange(shape[1])[None, :] < length_B1
  sampled_BT &= rng.random(shape) < 0.7
  sampled_BT[3] = False
  old_BT = -rng.exponential(size=shape)
  batch = {
    'logprob_BT': old_BT + rng.normal(scale=0.6, size=shape),
    'old_logprob_BT': old_BT,
    'advantage_BT': rng.normal(size=shape),
    'weight_BT': sampled_BT * rng.choice([0.1, 1.0, 1.4], shape),
  }
  batch = {name: jnp.array(x, jnp.float32) for name, x in batch.items()}
  return batch | {'sampled_BT': jnp.array(sampled_BT)}


# --- The policy loss ---------------------------------------------------------


@functools.partial(jax.jit, static_argnames=('reduction', 'dual_clip'))
def compute(logprob_BT, batch, dual_clip=DUAL, **numbers):
  """(loss, (pair, metrics)) and the gradient to the new log-probs."""

  def loss(logprob_BT):
    pair, metrics = losses.policy_loss(
      logprob_BT, **batch, **CLIP, dual_clip=dual_clip, **numbers
    )
    return trajectory.divide(*pair), (pair, metrics)

  return jax.value_and_grad(loss, has_aux=True)(logprob_BT)


def run(batch, **numbers):
  batch = dict(batch)
  return compute(batch.pop('logprob_BT'), batch, **numbers)


def region(ratio, gain, dual_clip):
  """Part of the objective that a token is in, from its equation."""
  if gain > 0 and ratio > 1.28:
    return 'above'
  if gain < 0 and ratio < 0.8:
    return 'below'
  if gain < 0 and dual_clip and ratio > dual_clip:
    return 'dual'
  return 'free'


def loop(batch, reduction, dual_clip, importance_BT=None):
  """(loss, gradient_BT, metrics), token by token in float64."""
  x = {name: np.asarray(value, np.float64) for name, value in batch.items()}
  weight_BT, mass_B = x['weight_BT'], x['weight_BT'].sum(axis=1)
  loss, gradient_BT, ratios, kls = 0.0, np.zeros(weight_BT.shape), [], []
  found = []
  for at in map(tuple, np.argwhere(x['sampled_BT'])):
    share = weight_BT[at] / mass_B.sum()
    if reduction == ROWS:
      share = weight_BT[at] / mass_B[at[0]] / (mass_B > 0).sum()
    if importance_BT is not None:
      share *= importance_BT[at]
    change = x['logprob_BT'][at] - x['old_logprob_BT'][at]
    ratio, gain = np.exp(change), x['advantage_BT'][at]
    found.append(region(ratio, gain, dual_clip))
    bound = {'above': 1.28, 'below': 0.8, 'dual': dual_clip, 'free': ratio}
    loss -= share * bound[found[-1]] * gain
    if found[-1] == 'free':
      gradient_BT[at] = -share * ratio * gain
    ratios.append(ratio)
    kls.append(ratio - 1 - change)
  metrics = {
    'clip_fraction': np.mean([name in ('above', 'below') for name in found]),
    'dual_clip_fraction': np.mean([name == 'dual' for name in found]),
    'approx_kl': np.mean(kls),
    'ratio_max': max(ratios),
  }
  return loss, gradient_BT, metrics


@pytest.mark.parametrize('has_importance', [False, True])
@pytest.mark.parametrize('dual_clip', [None, DUAL])
@pytest.mark.parametrize('reduction', losses.REDUCTIONS)
def test_policy_loss_against_a_loop(reduction, dual_clip, has_importance):
  """Importance is a factor of the loss and in no denominator."""
  for seed in range(2):
    batch, numbers = ragged(seed), {}
    if has_importance:
      rng = np.random.default_rng(seed)
      factor_BT = rng.exponential(size=(8, 20)).astype(np.float32)
      numbers['importance_BT'] = factor_BT
    want, want_BT, metrics = loop(batch, reduction, dual_clip, **numbers)
    numbers |= dict(reduction=reduction, dual_clip=dual_clip)
    (got, ((_, count), got_metrics)), gradient_BT = run(batch, **numbers)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient_BT, want_BT, rtol=1e-4, atol=1e-8)
    mass = batch['weight_BT'].sum() if reduction == TOKENS else 7
    np.testing.assert_allclose(count, mass, rtol=1e-6)
    assert count == losses.denominator(batch['weight_BT'], reduction=reduction)
    assert metrics['clip_fraction'] > 0
    assert (metrics['dual_clip_fraction'] > 0) == (dual_clip is not None)
    got_metrics['ratio_max'] = (got_metrics['ratio_max'], 1.0)
    for name, value in metrics.items():
      np.testing.assert_allclose(
        trajectory.divide(*got_metrics[name]), value, rtol=1e-5, err_msg=name
      )


@pytest.mark.parametrize('reduction', losses.REDUCTIONS)
def test_only_the_new_logprobs_receive_a_gradient(reduction):
  batch = ragged(1)
  sampled_BT = batch.pop('sampled_BT')
  batch['importance_BT'] = jnp.ones_like(batch['weight_BT'])

  def loss(batch):
    pair, _ = losses.policy_loss(
      **batch, sampled_BT=sampled_BT, **CLIP, reduction=reduction
    )
    return trajectory.divide(*pair)

  gradients = jax.grad(loss)(batch)
  assert np.any(gradients.pop('logprob_BT'))
  for name, gradient_BT in gradients.items():
    assert not np.any(gradient_BT), name


@pytest.mark.parametrize('name', ['logprob', 'old_logprob', 'advantage'])
def test_nan_on_unsampled_tokens_reaches_nothing(name):
  batch = ragged(2)
  x_BT = jnp.where(batch['sampled_BT'], batch[f'{name}_BT'], jnp.nan)
  dirty = batch | {f'{name}_BT': x_BT}
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


@pytest.mark.parametrize('reduction', losses.REDUCTIONS)
def test_no_weight_at_all_is_zero_and_not_nan(reduction):
  batch = ragged(3)
  for name in ('weight_BT', 'sampled_BT'):
    batch[name] = jnp.zeros_like(batch[name])
  (value, (_, metrics)), gradient_BT = run(batch, reduction=reduction)
  assert float(value) == 0.0 and not np.any(gradient_BT)
  assert all(np.all(np.isfinite(m)) for m in jax.tree.leaves(metrics))


def test_log_ratio_is_bounded_at_twenty():
  ones_BT = jnp.ones((1, 1))
  (total, _), _ = losses.policy_loss(
    200 * ones_BT, 0 * ones_BT, -ones_BT, ones_BT, **CLIP
  )
  np.testing.assert_allclose(total, np.exp(20.0), rtol=1e-5)


def test_unknown_choices_are_errors():
  batch, x_BT = ragged(0), jnp.zeros((1, 1))
  with pytest.raises(ValueError, match='dual_clip'):
    losses.policy_loss(**batch, **CLIP, dual_clip=1.0)
  with pytest.raises(ValueError, match='sequence_mean_token_mean'):
    losses.policy_loss(**batch, **CLIP, reduction='mean')
  with pytest.raises(ValueError, match='k1'):
    losses.kl(x_BT, x_BT, x_BT == 0, estimator='k4')


# --- All terms ---------------------------------------------------------------


def every_term(batch):
  """All loss terms of one (micro-)batch as a tree of (sum, count) pairs."""
  policy, metrics = losses.policy_loss(**batch, **CLIP, dual_clip=3.0)
  by_row, _ = losses.policy_loss(**batch, **CLIP, reduction=ROWS)
  metrics.pop('ratio_max')
  new_BT, old_BT = batch['logprob_BT'], batch['old_logprob_BT']
  sampled_BT = batch['sampled_BT']
  value, value_metrics = losses.value_loss(
    new_BT, old_BT, batch['advantage_BT'], sampled_BT, clip=0.5
  )
  return {
    'policy': policy,
    'policy by row': by_row,
    'value': value,
    'kl': losses.kl(new_BT, old_BT, sampled_BT, estimator='k3'),
    'entropy': losses.entropy_bonus(-new_BT, sampled_BT),
    'metrics': (metrics, value_metrics),
  }


def assert_close(found, wanted):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
    found,
    wanted,
  )


def test_sums_over_micro_batches_are_those_of_the_mini_batch():
  batch = ragged(4)
  compute = jax.jit(every_term)
  whole = compute(batch)
  parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(8)]
  terms = [compute(part) for part in parts]
  assert_close(jax.tree.map(lambda *x: sum(x), *terms), whole)
  # The mean of means, the wrong objective, is another number here.
  mean = np.mean([trajectory.divide(*t['policy']) for t in terms])
  assert abs(mean - float(trajectory.divide(*whole['policy']))) > 1e-3


def test_padding_changes_no_term():
  batch = ragged(6)
  padded = {k: jnp.pad(x, ((0, 2), (0, 7))) for k, x in batch.items()}
  assert_close(jax.jit(every_term)(padded), jax.jit(every_term)(batch))


def test_terms_are_float32_from_bfloat16_inputs():
  batch = {
    k: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
    for k, x in ragged(0).items()
  }
  shapes = jax.eval_shape(every_term, batch)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}


# --- Critic, KL, entropy -----------------------------------------------------


def test_value_loss_by_hand():
  # Old values 0, clip 0.5. Errors: inside the clip; past it, where the clipped
  # error is the larger; past it on the far side; and one not sampled.
  value_BT = jnp.array([[0.3, 2.0, -2.0, jnp.nan]])
  old_BT = jnp.array([[0.0, 0.0, 0.0, jnp.nan]])
  return_BT = jnp.array([[1.0, 2.0, 1.0, jnp.nan]])
  sampled_BT = jnp.array([[True, True, True, False]])

  def loss(*x_BT):
    (total, count), metrics = losses.value_loss(*x_BT, sampled_BT, clip=0.5)
    return total, (count, metrics)

  (total, (count, metrics)), gradients = jax.value_and_grad(
    loss, (0, 1, 2), has_aux=True
  )(value_BT, old_BT, return_BT)
  np.testing.assert_allclose(total, 0.5 * (0.49 + 2.25 + 9.0), rtol=1e-6)
  assert float(count) == 3
  np.testing.assert_array_equal(metrics['clip_fraction'], (1, 3))
  np.testing.assert_allclose(gradients[0], [[-0.7, 0, -3, 0]], rtol=1e-6)
  assert not np.any(gradients[1:])


@pytest.mark.parametrize(
  ('estimator', 'want', 'slope', 'bound'),
  [
    ('k1', 0.5, 1.0, -20.0),
    ('k2', 0.125, 0.5, 200.0),
    ('k3', np.exp(-0.5) - 0.5, 1 - np.exp(-0.5), 10.0),
  ],
)
def test_kl_and_its_gradient_by_hand(estimator, want, slope, bound):
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
  far_BT = jnp.full((1, 1), -300.0)
  total, _ = losses.kl(far_BT, 0 * far_BT, far_BT < 0, estimator=estimator)
  assert float(total) == bound


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


def test_entropy_bonus_is_the_plain_sum_over_sampled_tokens():
  entropy_BT = jnp.array([[1.0, 2.0, 4.0]])
  sampled_BT = jnp.array([[True, False, True]])
  np.testing.assert_array_equal(
    losses.entropy_bonus(entropy_BT, sampled_BT), (5.0, 2.0)
  )


# --- Importance weights and the sample size that is left ---------------------


def apart(seed, shape=(5, 11)):
  """Log-probs of the learner and the sampler, and a mask."""
  rng = np.random.default_rng(seed)
  old_BT = -rng.exponential(size=shape)
  sampler_BT = old_BT + rng.normal(size=shape)
  mask_BT = jnp.array(rng.random(shape) < 0.6)
  return jnp.float32(old_BT), jnp.float32(sampler_BT), mask_BT


@pytest.mark.parametrize('cap', [0.5, 2.0, 1e9])
def test_importance_against_a_loop(cap):
  """1 off the mask, whatever the cap."""
  old_BT, sampler_BT, sampled_BT = apart(0)
  want_BT = np.ones(old_BT.shape)
  for at in map(tuple, np.argwhere(sampled_BT)):
    ratio = np.exp(float(old_BT[at]) - float(sampler_BT[at]))
    want_BT[at] = min(ratio, cap)
  got_BT = losses.importance_weights(old_BT, sampler_BT, sampled_BT, cap=cap)
  np.testing.assert_allclose(got_BT, want_BT, rtol=1e-5)
  assert got_BT.dtype == jnp.float32
  assert (want_BT == cap).any() == (cap < 1e9)

  def total(*x_BT):
    weight_BT = losses.importance_weights(*x_BT, sampled_BT, cap=cap)
    return jnp.sum(jnp.square(weight_BT))

  assert not np.any(jax.grad(total, (0, 1))(old_BT, sampler_BT))


def test_importance_is_finite_for_tokens_far_apart_and_for_garbage():
  old_BT = jnp.array([[0.0, -500.0, jnp.nan]])
  sampler_BT = jnp.array([[-500.0, 0.0, jnp.inf]])
  sampled_BT = jnp.array([[True, True, False]])
  importance_BT = losses.importance_weights(
    old_BT, sampler_BT, sampled_BT, cap=5.0
  )
  np.testing.assert_allclose(importance_BT, [[5, 0, 1]], atol=1e-8)


@pytest.mark.parametrize('seed', range(2))
def test_sample_size_against_a_loop(seed):
  old_BT, sampler_BT, mask_BT = apart(seed)
  ratios = [
    np.exp(float(old_BT[at]) - float(sampler_BT[at]))
    for at in map(tuple, np.argwhere(mask_BT))
  ]
  squares = sum(ratio**2 for ratio in ratios)
  want = sum(ratios) ** 2 / (len(ratios) * squares)
  assert want < 0.9
  got = losses.effective_sample_size(old_BT, sampler_BT, mask_BT)
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('log_ratio', [-15.0, 0.0, 15.0])
def test_sample_size_of_equal_ratios_is_all_of_it(log_ratio):
  zero_BT, mask_BT = jnp.zeros((5, 11)), apart(0)[2]
  size = losses.effective_sample_size(zero_BT + log_ratio, zero_BT, mask_BT)
  np.testing.assert_allclose(size, 1.0, rtol=1e-5)


def test_sample_size_of_nothing_and_of_garbage():
  half_BT = jnp.array([[0.0, jnp.nan]])
  for mask, want in (([[False, False]], 0), ([[True, False]], 1)):
    size = losses.effective_sample_size(half_BT, half_BT, jnp.array(mask))
    assert float(size) == want
