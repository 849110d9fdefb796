"""Token weights: weights of thought and action tokens.

`token_weights` is the equation of the paper. Only the policy loss uses the
weights, and divides by their sum. `SCHEMES` maps the names of a config to
schemes.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from actfocus_jax.algorithm import trajectory


def token_weights(
  signal_BT: jax.Array,
  sampled_BT: jax.Array,
  action_BT: jax.Array,
  *,
  alpha: float,
  beta: float,
  eps: float = 1e-6,
) -> jax.Array:
  """Weight of each token in the policy loss.

      w_t = alpha                                     sampled, not action
      w_t = 1 + beta * sigmoid((s_t - mu) / sigma)    action
      w_t = 0                                         not sampled

  with mu the mean and `sigma = sqrt(var + eps)` of s over all action tokens of
  the batch (population variance). (1, 0) is plain PPO or GRPO, (0.1, 0.5) the
  paper's default. Source: arXiv 2605.14558, the token weight w_t.

  Args:
    signal_BT: signal of token t; read at action tokens only.
    sampled_BT: bool, written by the policy.
    action_BT: bool, inside the executed answer; a subset of `sampled_BT`.
    alpha: weight of a sampled token outside actions, >= 0.
    beta: height of the sigmoid on action tokens, >= 0.
    eps: floor of the variance, in squared units of the signal.

  Returns:
    weight_BT, float32, a constant for differentiation. Without any action
    token it is alpha on sampled tokens.
  """
  chex.assert_rank(signal_BT, 2)
  chex.assert_equal_shape([signal_BT, sampled_BT, action_BT])
  chex.assert_type([sampled_BT, action_BT], bool)
  signal_BT = jnp.where(action_BT, signal_BT.astype(jnp.float32), 0.0)
  mean, variance = trajectory.masked_moments(signal_BT, action_BT)
  score_BT = (signal_BT - mean) * jax.lax.rsqrt(variance + eps)
  thought_BT = jnp.where(sampled_BT, jnp.float32(alpha), 0.0)
  weight_BT = jnp.where(
    action_BT, 1.0 + beta * jax.nn.sigmoid(score_BT), thought_BT
  )
  return jax.lax.stop_gradient(weight_BT)


def top_entropy(
  entropy_BT: jax.Array, sampled_BT: jax.Array, *, share: float = 0.2
) -> jax.Array:
  """Return weight 1 on the most uncertain tokens, 0 on the others.

      w_t = 1[H_t >= tau]

  with tau the (1 - share) quantile of H over all sampled tokens of the batch.
  Divided by the sum of weights this is the paper's objective up to the factor
  `share`. `share` is the share of the sampled tokens that keep weight 1, in
  (0, 1]. Source: arXiv 2506.01939, section 5.

  Returns weight_BT, float32, a constant for differentiation.
  """
  chex.assert_equal_shape([entropy_BT, sampled_BT])
  chex.assert_type(sampled_BT, bool)
  known_BT = jnp.where(sampled_BT, entropy_BT.astype(jnp.float32), jnp.nan)
  threshold = jnp.nanquantile(known_BT, 1.0 - share)
  weight_BT = sampled_BT & (known_BT >= threshold)
  return jax.lax.stop_gradient(weight_BT.astype(jnp.float32))


def schedule(
  start: float, end: float | None, *, steps: int, step: jax.Array
) -> jax.Array:
  """Interpolate from `start` at step 0 to `end` at step `steps` and after.

  None keeps `start`; 0 steps give `end` at once. Returns a float32 scalar.
  """
  if end is None:
    return jnp.float32(start)
  done = jnp.minimum(step.astype(jnp.float32) / max(steps, 1), 1.0)
  done = jnp.where(steps > 0, done, 1.0)
  return (1.0 - done) * start + done * end


class WeightInputs(NamedTuple):
  """Arrays that a scheme computes the weights from.

  Attributes:
    signal_BT: signal of token t.
    entropy_BT: entropy of the policy's prediction of token t, nats.
    sampled_BT: bool, written by the policy.
    action_BT: bool, inside the executed answer; a subset of `sampled_BT`.
    step: finished training steps, int32.
  """

  signal_BT: jax.Array
  entropy_BT: jax.Array
  sampled_BT: jax.Array
  action_BT: jax.Array
  step: jax.Array


def by_action(
  inputs: WeightInputs,
  *,
  alpha: float,
  beta: float,
  alpha_end: float | None = None,
  beta_end: float | None = None,
  schedule_steps: int = 0,
) -> jax.Array:
  """Return `token_weights` with alpha and beta as of the training step."""
  return token_weights(
    inputs.signal_BT,
    inputs.sampled_BT,
    inputs.action_BT,
    alpha=schedule(alpha, alpha_end, steps=schedule_steps, step=inputs.step),
    beta=schedule(beta, beta_end, steps=schedule_steps, step=inputs.step),
  )


def by_entropy(inputs: WeightInputs, *, share: float = 0.2) -> jax.Array:
  """Return `top_entropy` of the policy before the update."""
  return top_entropy(inputs.entropy_BT, inputs.sampled_BT, share=share)


# weights.scheme -> (WeightInputs, numbers by keyword) -> weight_BT.
SCHEMES = {'action': by_action, 'top_entropy': by_entropy}


def action_mass(weight_BT: jax.Array, action_BT: jax.Array) -> jax.Array:
  """Share of the weight that is on action tokens, 0 without any: scalar."""
  mass, _ = trajectory.masked_sum_count(weight_BT, action_BT)
  return trajectory.divide(mass, jnp.sum(weight_BT, dtype=jnp.float32))


def signal_stats(
  signal_BT: jax.Array, action_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mean and population standard deviation of the signal over action tokens.

  Constants for differentiation; both 0 without action tokens.
  """
  mean, variance = trajectory.masked_moments(
    jax.lax.stop_gradient(signal_BT), action_BT
  )
  return mean, jnp.sqrt(variance)
