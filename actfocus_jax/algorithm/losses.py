"""Loss terms, each as a (sum, count) pair over tokens.

A term is computed per token in float32 and is 0 on tokens that were not
sampled. It is summed over the tokens of one micro-batch; the count is the
number of sampled tokens or, for the policy loss alone, the sum of their
weights. The caller adds sums over all micro-batches and devices of a mini-batch
and divides once (`trajectory.divide`). Dividing each micro-batch by its own
count would be another objective: it gives tokens of short rows more weight.

Metrics are pairs too; a metric that is not a pair is a maximum.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from actfocus_jax.algorithm import trajectory

KL_ESTIMATORS = ('k1', 'k2', 'k3')
REDUCTIONS = ('weighted_token_mean', 'sequence_mean_token_mean')

# exp(20) is 5e8: sums over a batch of it stay finite. Beyond the bound the
# gradient is 0, so a token this far gone cannot wreck a step.
_LOG_RATIO_BOUND = 20.0
_K3_BOUND = 10.0

Pair = tuple[jax.Array, jax.Array]


class Surrogate(NamedTuple):
  """Clipped objective of each token, and where a clip decided it.

  Attributes:
    surrogate_BT: objective, to be maximised, float32.
    is_clipped_BT: bool, the ratio's clip lowers the objective.
    is_dual_clipped_BT: bool, the dual clip raises it.
  """

  surrogate_BT: jax.Array
  is_clipped_BT: jax.Array
  is_dual_clipped_BT: jax.Array


def policy_loss(
  logprob_BT: jax.Array,
  old_logprob_BT: jax.Array,
  advantage_BT: jax.Array,
  weight_BT: jax.Array,
  *,
  clip_low: float,
  clip_high: float,
  dual_clip: float | None = None,
  reduction: str = 'weighted_token_mean',
  importance_BT: jax.Array | None = None,
  sampled_BT: jax.Array | None = None,
) -> tuple[Pair, dict[str, Any]]:
  """Weighted clipped surrogate.

      L = -sum_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t) / sum_t w_t

  with `r_t = exp(logprob_t - old_logprob_t)`, the log-ratio bounded to +-20.
  Sources: arXiv 2605.14558, the objective; see also `clipped_surrogate`.

  Args:
    logprob_BT: log-probability of token t under the policy being trained; the
      only argument that receives a gradient.
    old_logprob_BT: log-probs under the policy before the update: those of the
      sampler, or log-probs of a fresh forward pass.
    advantage_BT: advantage of token t.
    weight_BT: weight of token t, >= 0, and 0 where not sampled.
    clip_low: low of the equation.
    clip_high: high of the equation.
    dual_clip: None for the equation above, or c > 1.
    reduction: one of REDUCTIONS.
    importance_BT: factor of each token's loss that is in no denominator, or
      None for 1; see `importance_weights`.
    sampled_BT: bool, the tokens that metrics count. Without it those of weight
      above 0, which leaves out the thoughts when alpha is 0.

  Returns:
    ((sum, count), metrics): the pair whose quotient is L, from `reduce_loss`,
    and `policy_metrics`.

  Raises:
    ValueError: `dual_clip` is not above 1, or the reduction is unknown.
  """
  chex.assert_rank(logprob_BT, 2)
  weight_BT = jax.lax.stop_gradient(weight_BT.astype(jnp.float32))
  mask_BT = weight_BT > 0 if sampled_BT is None else sampled_BT
  chex.assert_equal_shape(
    [logprob_BT, old_logprob_BT, advantage_BT, weight_BT, mask_BT]
  )
  advantage_BT = jax.lax.stop_gradient(_masked(advantage_BT, mask_BT))
  ratio_BT = jnp.exp(
    _log_ratio(logprob_BT, jax.lax.stop_gradient(old_logprob_BT), mask_BT)
  )
  clips = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
  surrogate = clipped_surrogate(ratio_BT, advantage_BT, **clips)
  loss_BT = -weight_BT * surrogate.surrogate_BT
  if importance_BT is not None:
    loss_BT = loss_BT * jax.lax.stop_gradient(importance_BT)
  pair = reduce_loss(loss_BT, weight_BT, reduction=reduction)
  metrics = policy_metrics(surrogate, ratio_BT, mask_BT)
  approx_kl = kl(old_logprob_BT, logprob_BT, mask_BT, estimator='k3')
  return pair, metrics | {'approx_kl': approx_kl}


def clipped_surrogate(
  ratio_BT: jax.Array,
  advantage_BT: jax.Array,
  *,
  clip_low: float,
  clip_high: float,
  dual_clip: float | None = None,
) -> Surrogate:
  """Clipped objective of each token: `min(r A, clip(r, 1 - low, 1 + high) A)`.

  Where A < 0, `dual_clip` = c bounds it below by c A. Sources: PPO, arXiv
  1707.06347, equation 7; two bounds, arXiv 2503.14476; dual clip, arXiv
  1912.09729. The numbers are those of `policy_loss`.

  Raises:
    ValueError: `dual_clip` is not above 1.
  """
  if dual_clip is not None and dual_clip <= 1:
    raise ValueError(f'dual_clip must be None or above 1, got {dual_clip}')
  free_BT = ratio_BT * advantage_BT
  clipped_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high) * advantage_BT
  lower_BT = jnp.minimum(free_BT, clipped_BT)
  floor_BT = jnp.full_like(lower_BT, -jnp.inf)
  if dual_clip is not None:
    floor_BT = jnp.where(advantage_BT < 0, dual_clip * advantage_BT, -jnp.inf)
  return Surrogate(
    jnp.maximum(lower_BT, floor_BT), clipped_BT < free_BT, floor_BT > lower_BT
  )


def reduce_loss(
  loss_BT: jax.Array, weight_BT: jax.Array, *, reduction: str
) -> Pair:
  """Reduce the weighted loss of each token to a (sum, count).

  `weighted_token_mean` is one mean over all tokens. `sequence_mean_token_mean`
  is a mean over each row, then one over the rows: a token of a short row
  counts for more. The count is `denominator`.
  """
  count = denominator(weight_BT, reduction=reduction)
  if reduction == 'weighted_token_mean':
    return jnp.sum(loss_BT), count
  loss_B = trajectory.divide(
    jnp.sum(loss_BT, axis=1), jnp.sum(weight_BT, axis=1)
  )
  return jnp.sum(loss_B), count


def policy_metrics(
  surrogate: Surrogate, ratio_BT: jax.Array, mask_BT: jax.Array
) -> dict[str, Any]:
  """Metrics over the masked tokens; `ratio_max` is 0 of no tokens."""
  count_of = trajectory.masked_sum_count
  return {
    'clip_fraction': count_of(surrogate.is_clipped_BT, mask_BT),
    'dual_clip_fraction': count_of(surrogate.is_dual_clipped_BT, mask_BT),
    'ratio_max': jnp.max(jnp.where(mask_BT, ratio_BT, 0.0), initial=0.0),
  }


def denominator(weight_BT: jax.Array, *, reduction: str) -> jax.Array:
  """Sum of the weights, or number of the rows that have some: float32 scalar.

  Raises:
    ValueError: the reduction is unknown.
  """
  if reduction not in REDUCTIONS:
    raise ValueError(f'reduction must be in {REDUCTIONS}, got {reduction!r}')
  if reduction == 'weighted_token_mean':
    return jnp.sum(weight_BT, dtype=jnp.float32)
  return jnp.sum(jnp.any(weight_BT > 0, axis=1), dtype=jnp.float32)


def importance_weights(
  old_logprob_BT: jax.Array,
  sampler_logprob_BT: jax.Array,
  sampled_BT: jax.Array,
  *,
  cap: float,
) -> jax.Array:
  """Truncated importance weights between the learner's and the sampler's view.

      min(exp(old_logprob - sampler_logprob), cap)

  The two are the same policy; what differs is rounding, or a sampler that is
  behind. Source: truncated importance sampling, Ionides (2008).

  Returns importance_BT, float32, a constant for differentiation; 1 off the
  mask.
  """
  log_ratio_BT = _log_ratio(old_logprob_BT, sampler_logprob_BT, sampled_BT)
  capped_BT = jnp.minimum(jnp.exp(log_ratio_BT), cap)
  return jax.lax.stop_gradient(jnp.where(sampled_BT, capped_BT, 1.0))


def effective_sample_size(
  logprob_BT: jax.Array, other_BT: jax.Array, sampled_BT: jax.Array
) -> jax.Array:
  """Share of the tokens that a reweighted mean is worth: from 1 / n to 1.

      (sum_t r_t)^2 / (n sum_t r_t^2),  r = exp(logprob - other)

  Returns a float32 scalar; 0 without sampled tokens. Source: Kong (1992).
  """
  log_ratio_BT = _log_ratio(logprob_BT, other_BT, sampled_BT)
  # The scale of the ratios cancels; the largest one becomes 1.
  largest = jnp.max(jnp.where(sampled_BT, log_ratio_BT, -jnp.inf))
  ratio_BT = jnp.exp(jnp.where(sampled_BT, log_ratio_BT - largest, 0.0))
  total, count = trajectory.masked_sum_count(ratio_BT, sampled_BT)
  squares, _ = trajectory.masked_sum_count(jnp.square(ratio_BT), sampled_BT)
  return trajectory.divide(jnp.square(total), count * squares)


def value_loss(
  value_BT: jax.Array,
  old_value_BT: jax.Array,
  return_BT: jax.Array,
  sampled_BT: jax.Array,
  *,
  clip: float,
) -> tuple[Pair, dict[str, Any]]:
  """Clipped squared error of the critic, not weighted.

      0.5 * max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2)

  with R the return and `clip` the largest move of the value, in units of R.
  Only `value_BT` receives a gradient.

  Returns ((sum, count), metrics) over sampled tokens. `clip_fraction` in
  metrics is the (sum, count) of tokens whose clipped error is the larger one.
  """
  chex.assert_rank(value_BT, 2)
  chex.assert_equal_shape([value_BT, old_value_BT, return_BT, sampled_BT])
  value_BT = _masked(value_BT, sampled_BT)
  old_value_BT = jax.lax.stop_gradient(_masked(old_value_BT, sampled_BT))
  return_BT = jax.lax.stop_gradient(_masked(return_BT, sampled_BT))
  near_BT = jnp.clip(value_BT, old_value_BT - clip, old_value_BT + clip)
  free_BT = jnp.square(value_BT - return_BT)
  clipped_BT = jnp.square(near_BT - return_BT)
  loss_BT = 0.5 * jnp.maximum(free_BT, clipped_BT)
  clip_fraction = trajectory.masked_sum_count(clipped_BT > free_BT, sampled_BT)
  return (
    trajectory.masked_sum_count(loss_BT, sampled_BT),
    {'clip_fraction': clip_fraction},
  )


def kl(
  logprob_BT: jax.Array,
  ref_logprob_BT: jax.Array,
  sampled_BT: jax.Array,
  *,
  estimator: str,
) -> Pair:
  """Estimate of KL(policy || reference) from tokens of the policy.

  With `d = logprob - ref_logprob`, bounded to +-20:

      k1 = d      k2 = d^2 / 2      k3 = exp(-d) - 1 + d, bounded to +-10

  As a value k1 and k3 are unbiased, k1 with more variance; as a loss term the
  gradient of k1 has mean 0 on the policy's own tokens, and that of k2 is
  the unbiased one. Source: http://joschu.net/blog/kl-approx.html.

  Returns (sum, count) over sampled tokens, nats, not weighted. The reference
  receives no gradient.

  Raises:
    ValueError: the estimator is unknown.
  """
  if estimator not in KL_ESTIMATORS:
    raise ValueError(f'estimator must be in {KL_ESTIMATORS}, got {estimator!r}')
  chex.assert_rank(logprob_BT, 2)
  chex.assert_equal_shape([logprob_BT, ref_logprob_BT, sampled_BT])
  ref_logprob_BT = jax.lax.stop_gradient(ref_logprob_BT)
  d_BT = _log_ratio(logprob_BT, ref_logprob_BT, sampled_BT)
  if estimator == 'k1':
    kl_BT = d_BT
  elif estimator == 'k2':
    kl_BT = 0.5 * jnp.square(d_BT)
  else:
    kl_BT = jnp.clip(jnp.expm1(-d_BT) + d_BT, -_K3_BOUND, _K3_BOUND)
  return trajectory.masked_sum_count(kl_BT, sampled_BT)


def entropy_bonus(entropy_BT: jax.Array, sampled_BT: jax.Array) -> Pair:
  """(sum, count) of the entropy over sampled tokens; the loss subtracts it."""
  return trajectory.masked_sum_count(entropy_BT, sampled_BT)


def _masked(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """`x` in float32, 0 off the mask, where it may hold anything."""
  return jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)


def _log_ratio(
  logprob_BT: jax.Array, other_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
  """`logprob - other`, bounded so that its exponential stays finite."""
  log_ratio_BT = _masked(logprob_BT, mask_BT) - _masked(other_BT, mask_BT)
  return jnp.clip(log_ratio_BT, -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
