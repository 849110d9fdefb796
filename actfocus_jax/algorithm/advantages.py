"""Advantages of tokens, from rewards.

PPO: generalised advantage estimation over sampled tokens, then whitening over
the batch. GRPO: the return relative to the group, the same on every sampled
token of a row. `estimators` maps names to these and other estimators.

All are constants for differentiation and are 0 on tokens that were not sampled.
Token weights do not change them.
"""

import chex
import jax
import jax.numpy as jnp

from actfocus_jax.algorithm import selection, trajectory


def group_relative(
  return_PG: jax.Array, *, normalize_std: bool = True, eps: float = 1e-6
) -> jax.Array:
  """Return relative to the group: `(R - mean) / (std + eps)`.

  Source: GRPO, arXiv 2402.03300; without the division, arXiv 2503.20783.

  The standard deviation is unbiased. Returns advantage_PG, float32; exactly 0
  in a group of one and where the returns differ by rounding only (see
  `selection.group_spread`). `reshape(-1)` puts it in the order of the rows.
  """
  return_PG = return_PG.astype(jnp.float32)
  spread_P1 = selection.group_spread(return_PG)[:, None]
  advantage_PG = return_PG - jnp.mean(return_PG, axis=1, keepdims=True)
  if normalize_std:
    advantage_PG = advantage_PG / (spread_P1 + eps)
  return jnp.where(spread_P1 > 0, advantage_PG, 0.0)


def on_last_token(return_B: jax.Array, sampled_BT: jax.Array) -> jax.Array:
  """Return of each episode, as a reward on its last sampled token.

  The paper's PPO has this one reward: the target of every token is the whole
  return. With `Trajectory.reward` as it is, the target of a token is the sum of
  the rewards that come after it. Returns reward_BT, float32, 0 elsewhere and in
  rows without a sampled token.
  """
  chex.assert_shape(sampled_BT, (return_B.shape[0], None))
  position_1T = jnp.arange(sampled_BT.shape[1])[None, :]
  last_B1 = jnp.max(
    jnp.where(sampled_BT, position_1T, -1), axis=1, keepdims=True
  )
  return broadcast(return_B, position_1T == last_B1)


def gae(
  reward_BT: jax.Array,
  value_BT: jax.Array,
  sampled_BT: jax.Array,
  *,
  discount: float = 1.0,
  lam: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation over sampled tokens only.

      delta_t = r_t + discount * V_t' - V_t
      A_t     = delta_t + discount * lam * A_t'

  where t' is the NEXT SAMPLED token: the recursion passes through prompts and
  observations unchanged, and both terms with t' are 0 after the last one.
  Source: arXiv 1506.02438, equation 16, on the tokens of the policy.

  Args:
    reward_BT: on the last sampled token of each turn, or of the episode. A
      reward on a token that was not sampled is ignored.
    value_BT: value of the state in which token t was chosen, so from the
      tokens before t; read at sampled tokens only.
    sampled_BT: bool, written by the policy.
    discount: per sampled token, in [0, 1].
    lam: 1 gives the return minus the value, 0 the one-step error; in [0, 1].

  Returns:
    (advantage_BT, return_BT), float32, 0 where not sampled; the return is
    advantage plus value, the target of the critic.
  """
  chex.assert_rank(reward_BT, 2)
  chex.assert_equal_shape([reward_BT, value_BT, sampled_BT])
  chex.assert_type(sampled_BT, bool)

  def step(later, token):
    later_advantage_B, later_value_B = later
    reward_B, value_B, sampled_B = token
    delta_B = reward_B + discount * later_value_B - value_B
    advantage_B = delta_B + discount * lam * later_advantage_B
    later = (
      jnp.where(sampled_B, advantage_B, later_advantage_B),
      jnp.where(sampled_B, value_B, later_value_B),
    )
    return later, advantage_B

  reward_BT = reward_BT.astype(jnp.float32)
  value_BT = jax.lax.stop_gradient(value_BT.astype(jnp.float32))
  zero_B = jnp.zeros(value_BT.shape[:1], jnp.float32)
  _, advantage_TB = jax.lax.scan(
    step,
    (zero_B, zero_B),
    (reward_BT.T, value_BT.T, sampled_BT.T),
    reverse=True,
  )
  advantage_BT = jnp.where(sampled_BT, advantage_TB.T, 0.0)
  return advantage_BT, jnp.where(sampled_BT, advantage_BT + value_BT, 0.0)


def whiten(advantage_BT: jax.Array, sampled_BT: jax.Array) -> jax.Array:
  """Mean 0 and variance 1 over all sampled tokens of the batch.

      (A - mean) / sqrt(var + 1e-8)      var unbiased

  Returns advantage_BT, float32, without unit; 0 where not sampled, and
  everywhere when all are equal.
  """
  advantage_BT = advantage_BT.astype(jnp.float32)
  mean, variance = trajectory.masked_moments(advantage_BT, sampled_BT)
  count = jnp.sum(sampled_BT, dtype=jnp.float32)
  variance = variance * count / jnp.maximum(count - 1.0, 1.0)
  white_BT = (advantage_BT - mean) * jax.lax.rsqrt(variance + 1e-8)
  return jax.lax.stop_gradient(jnp.where(sampled_BT, white_BT, 0.0))


def broadcast(advantage_B: jax.Array, sampled_BT: jax.Array) -> jax.Array:
  """One advantage per row, on each of its sampled tokens: float32 [B, T]."""
  chex.assert_shape(sampled_BT, (advantage_B.shape[0], None))
  chex.assert_type(sampled_BT, bool)
  advantage_B1 = advantage_B.astype(jnp.float32)[:, None]
  return jnp.where(sampled_BT, advantage_B1, 0.0)
