"""Estimators that judge a turn as a whole; baselines from other papers.

Each turns rewards into one number per turn and puts it on every token that the
policy sampled in that turn. What holds for `advantages` holds here: constants
for differentiation, 0 on tokens that nobody sampled.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from actfocus_jax.algorithm import advantages, trajectory, turns

# Returns of steps that ought to be equal agree to about this much.
_ROUNDING = 1e-6


def gigpo(
  reward_BT: jax.Array,
  sampled_BT: jax.Array,
  turn_BT: jax.Array,
  anchor_BT: jax.Array,
  *,
  members: int,
  num_turns: int,
  normalize_std: bool = True,
  step_weight: float = 1.0,
  discount: float = 0.95,
  eps: float = 1e-6,
) -> jax.Array:
  """Group-in-group: the episode among its group, the step among its state.

      A = A_episode + step_weight * A_step
      R_k = sum_{l >= k} discount^(l - k) r_l
      A_step = (R_k - mean) / (std + eps)

  over all turns, of all members of the group, that began in the same state of
  the environment; 0 for a state that was met once. `A_episode` is that of
  `advantages.group_relative`. Source: GiGPO, arXiv 2505.10978, section 4.

  Args:
    reward_BT: on turn ends; rows are group-major.
    sampled_BT: bool, written by the policy.
    turn_BT: int32, index of each token's turn.
    anchor_BT: int32, what the turn's state of the environment is told by;
      equal states have equal ones. Read at sampled tokens.
    members: G.
    num_turns: K, at least the turns of any episode.
    normalize_std: divide by the unbiased standard deviation, of both groups.
    step_weight: omega of the paper.
    discount: per turn, in [0, 1].
    eps: added to standard deviations.

  Returns:
    advantage_BT, float32.

  Raises:
    AssertionError: the shapes differ.
  """
  chex.assert_equal_shape([reward_BT, sampled_BT, turn_BT, anchor_BT])
  reward_BK, count_BK = turns.total(
    reward_BT, sampled_BT, turn_BT, turns=num_turns
  )
  later_BK = _discounted(reward_BK, discount)
  start_BT = turns.first(sampled_BT, turn_BT)
  anchor_BK = turns.pick(anchor_BT, start_BT, turn_BT, turns=num_turns)

  def by_group(x_BK):
    return x_BK.reshape(-1, members * num_turns)

  step_PN = _among_equals(
    by_group(later_BK),
    by_group(anchor_BK),
    by_group(count_BK > 0),
    normalize_std=normalize_std,
    eps=eps,
  )
  step_BT = turns.spread(step_PN.reshape(later_BK.shape), sampled_BT, turn_BT)
  # A lost episode has its return where nothing was sampled (`Trajectory`).
  return_B = jnp.where(
    jnp.any(sampled_BT, axis=1),
    jnp.sum(reward_BK, axis=1),
    jnp.sum(reward_BT, axis=1),
  )
  return_PG = return_B.reshape(-1, members)
  episode_PG = advantages.group_relative(
    return_PG, normalize_std=normalize_std, eps=eps
  )
  episode_BT = advantages.broadcast(episode_PG.reshape(-1), sampled_BT)
  return episode_BT + step_weight * step_BT


def _discounted(reward_BK: jax.Array, discount: float) -> jax.Array:
  """The discounted sum of the rewards from each turn on."""

  def step(later_B, reward_B):
    later_B = reward_B + discount * later_B
    return later_B, later_B

  zero_B = jnp.zeros(reward_BK.shape[:1], jnp.float32)
  _, later_KB = jax.lax.scan(step, zero_B, reward_BK.T, reverse=True)
  return later_KB.T


def _among_equals(
  return_PN: jax.Array,
  anchor_PN: jax.Array,
  exists_PN: jax.Array,
  *,
  normalize_std: bool,
  eps: float,
) -> jax.Array:
  """Each return relative to those of the same group with the same anchor."""
  same_PNN = anchor_PN[:, :, None] == anchor_PN[:, None, :]
  same_PNN = same_PNN & exists_PN[:, :, None] & exists_PN[:, None, :]
  # Written as sums, not as matrix products: float32 on every platform.
  count_PN = jnp.sum(same_PNN, axis=2, dtype=jnp.float32)

  def mean_of(x_PNN, count_PN):
    total_PN = jnp.sum(jnp.where(same_PNN, x_PNN, 0.0), axis=2)
    return total_PN / jnp.maximum(count_PN, 1.0)

  other_PNN = jnp.broadcast_to(return_PN[:, None, :], same_PNN.shape)
  mean_PN = mean_of(other_PNN, count_PN)
  centered_PNN = other_PNN - mean_PN[:, :, None]
  largest_PN = jnp.max(jnp.where(same_PNN, jnp.abs(centered_PNN), 0.0), axis=2)
  std_PN = jnp.sqrt(mean_of(jnp.square(centered_PNN), count_PN - 1.0))
  step_PN = return_PN - mean_PN
  if normalize_std:
    step_PN = step_PN / (std_PN + eps)
  scale_PN = jnp.maximum(jnp.abs(mean_PN), 1.0)
  differs_PN = exists_PN & (largest_PN > _ROUNDING * scale_PN)
  return jnp.where(differs_PN, step_PN, 0.0)


def entropy_modulated(
  advantage_BT: jax.Array,
  entropy_BT: jax.Array,
  sampled_BT: jax.Array,
  turn_BT: jax.Array,
  *,
  num_turns: int,
  scale: float = 1.0,
  clarity_scale: float = 1.0,
  clarity_bonus: float = 0.1,
) -> jax.Array:
  """Surer turns move more, and turns that lead to sure ones get a bonus.

      H_k   = (mean entropy of turn k - min) / (max - min + 1e-8)
      g(H)  = exp(-scale H) / mean_k exp(-scale H_k)
      A_k   = A g(H_k) + clarity_bonus exp(-clarity_scale H_{k+1})
      A_k   = A_k - mean over all turns of the batch

  with min, max and means over all turns of the batch; the last turn of an
  episode has no bonus. Source: EMPG, arXiv 2509.09265, equations 7 to 12.

  Args:
    advantage_BT: of the outcome, the same on a whole row.
    entropy_BT: of the policy that sampled, at temperature 1, nats.
    sampled_BT: bool, written by the policy.
    turn_BT: int32, index of each token's turn.
    num_turns: K, at least the turns of any episode.
    scale: k of the paper.
    clarity_scale: k' of the paper.
    clarity_bonus: zeta of the paper.

  Returns:
    advantage_BT, float32.

  Raises:
    AssertionError: the shapes differ.
  """
  chex.assert_equal_shape([advantage_BT, entropy_BT, sampled_BT, turn_BT])
  to_turns = functools.partial(
    turns.mean, mask_BT=sampled_BT, turn_BT=turn_BT, turns=num_turns
  )
  _, count_BK = turns.total(sampled_BT, sampled_BT, turn_BT, turns=num_turns)
  exists_BK = count_BK > 0
  entropy_BK = to_turns(jax.lax.stop_gradient(entropy_BT))
  low = jnp.min(jnp.where(exists_BK, entropy_BK, jnp.inf))
  high = jnp.max(jnp.where(exists_BK, entropy_BK, -jnp.inf))
  norm_BK = jnp.where(exists_BK, (entropy_BK - low) / (high - low + 1e-8), 0.0)
  gain_BK = jnp.exp(-scale * norm_BK)
  gain_BK = gain_BK / trajectory.masked_mean(gain_BK, exists_BK)
  clarity_BK = jnp.where(exists_BK, jnp.exp(-clarity_scale * norm_BK), 0.0)
  next_BK = jnp.pad(clarity_BK[:, 1:], ((0, 0), (0, 1)))
  modulated_BK = to_turns(advantage_BT) * gain_BK + clarity_bonus * next_BK
  modulated_BK -= trajectory.masked_mean(modulated_BK, exists_BK)
  modulated_BT = turns.spread(modulated_BK, sampled_BT, turn_BT)
  return jax.lax.stop_gradient(modulated_BT)


def turn_gae(
  reward_BT: jax.Array,
  value_BT: jax.Array,
  sampled_BT: jax.Array,
  turn_BT: jax.Array,
  *,
  num_turns: int,
  discount: float = 0.99,
  lam: float = 0.9,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Generalised advantage estimation in which a turn is one action.

      delta_k = r_k + discount V_{k+1} - V_k
      A_k     = delta_k + discount lam A_{k+1}

  V_k is the value at the first token of turn k, from all that stands before
  it; every token of the turn has A_k. Source: turn-PPO, arXiv 2512.17008.

  Args:
    reward_BT: on turn ends.
    value_BT: aligned as for `advantages.gae`; read where a turn begins.
    sampled_BT: bool, written by the policy.
    turn_BT: int32, index of each token's turn.
    num_turns: K, at least the turns of any episode.
    discount: per turn, in [0, 1].
    lam: in [0, 1].

  Returns:
    (advantage_BT, return_BT, critic_BT): the return, advantage plus value, is
    the target of the critic where `critic_BT` is True: where turns begin.

  Raises:
    AssertionError: the shapes differ.
  """
  chex.assert_equal_shape([reward_BT, value_BT, sampled_BT, turn_BT])
  start_BT = turns.first(sampled_BT, turn_BT)
  total = functools.partial(turns.total, turn_BT=turn_BT, turns=num_turns)
  reward_BK, count_BK = total(reward_BT, sampled_BT)
  value_BK, _ = total(jax.lax.stop_gradient(value_BT), start_BT)
  advantage_BK, return_BK = advantages.gae(
    reward_BK, value_BK, count_BK > 0, discount=discount, lam=lam
  )
  return (
    turns.spread(advantage_BK, sampled_BT, turn_BT),
    turns.spread(return_BK, start_BT, turn_BT),
    start_BT,
  )
