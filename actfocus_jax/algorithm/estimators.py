"""Advantage estimators by name, all with one signature.

Each takes `Inputs` and its numbers by keyword, and returns a `Credit`. The
estimators of PPO and GRPO call `advantages`; the others compute one advantage
per turn and put it on every token that the policy sampled in it. All advantages
are constants for differentiation and are 0 on tokens that were not sampled.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp

from actfocus_jax.algorithm import advantages, trajectory, turns

REWARD_PLACEMENTS = ('final', 'turn')

_EPS = 1e-6
# Returns of steps that ought to be equal agree to about this much.
_ROUNDING = 1e-6


@flax.struct.dataclass
class Inputs:
  """Rewards, scores and masks of a batch with group-major rows.

  Attributes:
    return_PG: returns of the G members of P groups.
    reward_BT: reward of a turn, on its turn end.
    value_BT: value of the state in which token t was chosen, from the tokens
      before t; None without a critic.
    entropy_BT: entropy of the policy before the update at temperature 1, nats.
    sampled_BT: bool, written by the policy.
    turn_BT: int32, index of each token's turn; read at sampled tokens.
    anchor_BT: int32, number of the environment's state at the beginning of the
      turn; equal states have equal numbers. Read at sampled tokens.
    num_turns: K, at least the turns of any episode; static.
  """

  return_PG: jax.Array
  reward_BT: jax.Array
  value_BT: jax.Array | None
  entropy_BT: jax.Array
  sampled_BT: jax.Array
  turn_BT: jax.Array
  anchor_BT: jax.Array
  num_turns: int = flax.struct.field(pytree_node=False)


class Credit(NamedTuple):
  """Advantages of the sampled tokens, and the targets of the critic.

  Attributes:
    advantage_BT: advantage, 0 where not sampled.
    return_BT: target of the critic, or None without one.
    critic_BT: bool, the tokens at which the critic learns; None without one.
  """

  advantage_BT: jax.Array
  return_BT: jax.Array | None = None
  critic_BT: jax.Array | None = None


# --- Estimators --------------------------------------------------------------


def group_relative(inputs: Inputs, *, normalize_std: bool = True) -> Credit:
  """GRPO: see `advantages.group_relative`."""
  advantage_PG = advantages.group_relative(
    inputs.return_PG, normalize_std=normalize_std
  )
  return Credit(
    advantages.broadcast(advantage_PG.reshape(-1), inputs.sampled_BT)
  )


def gae(
  inputs: Inputs,
  *,
  reward_placement: str = 'final',
  discount: float = 1.0,
  lam: float = 1.0,
) -> Credit:
  """PPO: `advantages.gae`, whitened over the sampled tokens of the batch.

  `reward_placement` 'final' puts the whole return on the last sampled token,
  'turn' leaves each reward on its turn end.

  Raises:
    ValueError: the placement is unknown.
  """
  if reward_placement not in REWARD_PLACEMENTS:
    raise ValueError(
      f'reward_placement must be in {REWARD_PLACEMENTS}, got '
      f'{reward_placement!r}'
    )
  reward_BT, sampled_BT = inputs.reward_BT, inputs.sampled_BT
  if reward_placement == 'final':
    reward_BT = advantages.on_last_token(reward_BT.sum(axis=1), sampled_BT)
  advantage_BT, return_BT = advantages.gae(
    reward_BT, inputs.value_BT, sampled_BT, discount=discount, lam=lam
  )
  white_BT = advantages.whiten(advantage_BT, sampled_BT)
  return Credit(white_BT, return_BT, sampled_BT)


# --- Of other papers, turn by turn -------------------------------------------


def gigpo(
  inputs: Inputs,
  *,
  normalize_std: bool = True,
  step_weight: float = 1.0,
  discount: float = 0.95,
) -> Credit:
  """Group-in-group: episode-level plus step-level advantage.

      A = A_episode + step_weight * A_step
      R_k = sum_{l >= k} discount^(l - k) r_l
      A_step = (R_k - mean) / (std + 1e-6)

  over all turns, of all members of the group, that began in the same state of
  the environment; 0 for a state that occurs once. `A_episode` is
  `advantages.group_relative`. Source: GiGPO, arXiv 2505.10978, section 4.

  `step_weight` is the paper's omega, `discount` is per turn; `normalize_std`
  divides by the unbiased standard deviation of both groups.
  """
  reward_BT, sampled_BT = inputs.reward_BT, inputs.sampled_BT
  turn_BT, anchor_BT = inputs.turn_BT, inputs.anchor_BT
  members, num_turns = inputs.return_PG.shape[1], inputs.num_turns
  chex.assert_equal_shape([reward_BT, sampled_BT, turn_BT, anchor_BT])
  reward_BK, count_BK = turns.total(
    reward_BT, sampled_BT, turn_BT, turns=num_turns
  )
  later_BK = _discounted(reward_BK, discount)
  start_BT = turns.first(sampled_BT, turn_BT)
  anchor_BK = turns.pick(anchor_BT, start_BT, turn_BT, turns=num_turns)
  by_group = (-1, members * num_turns)
  step_PN = _among_equals(
    later_BK.reshape(by_group),
    anchor_BK.reshape(by_group),
    (count_BK > 0).reshape(by_group),
    normalize_std=normalize_std,
  )
  step_BT = turns.spread(step_PN.reshape(later_BK.shape), sampled_BT, turn_BT)
  # A lost episode has its return where nothing was sampled (`Trajectory`).
  return_B = jnp.where(
    jnp.any(sampled_BT, axis=1),
    jnp.sum(reward_BK, axis=1),
    jnp.sum(reward_BT, axis=1),
  )
  episode_PG = advantages.group_relative(
    return_B.reshape(-1, members), normalize_std=normalize_std, eps=_EPS
  )
  episode_BT = advantages.broadcast(episode_PG.reshape(-1), sampled_BT)
  return Credit(episode_BT + step_weight * step_BT)


def empg(
  inputs: Inputs,
  *,
  normalize_std: bool = True,
  scale: float = 1.0,
  clarity_scale: float = 1.0,
  clarity_bonus: float = 0.1,
) -> Credit:
  """EMPG: scales the advantage by confidence, adds a clarity bonus.

      H_k   = (mean entropy of turn k - min) / (max - min + 1e-8)
      g(H)  = exp(-scale H) / mean_k exp(-scale H_k)
      A_k   = A g(H_k) + clarity_bonus exp(-clarity_scale H_{k+1})
      A_k   = A_k - mean over all turns of the batch

  with A of `group_relative`, and min, max and means over all turns of the
  batch; the last turn of an episode has no bonus. Source: EMPG, arXiv
  2509.09265, equations 7 to 12.

  `scale`, `clarity_scale` and `clarity_bonus` are k, k' and zeta of the paper.
  """
  entropy_BT, sampled_BT = inputs.entropy_BT, inputs.sampled_BT
  turn_BT, num_turns = inputs.turn_BT, inputs.num_turns
  credit = group_relative(inputs, normalize_std=normalize_std)
  advantage_BT = credit.advantage_BT
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
  return Credit(jax.lax.stop_gradient(modulated_BT))


def turn_gae(
  inputs: Inputs, *, discount: float = 0.99, lam: float = 0.9
) -> Credit:
  """Generalised advantage estimation in which a turn is one action, whitened.

      delta_k = r_k + discount V_{k+1} - V_k
      A_k     = delta_k + discount lam A_{k+1}

  V_k is the value at the first token of turn k; every token of the turn has
  A_k. The critic learns at the first token of each turn. `discount` is per
  turn. Source: turn-PPO, arXiv 2512.17008.
  """
  reward_BT, value_BT = inputs.reward_BT, inputs.value_BT
  sampled_BT, turn_BT = inputs.sampled_BT, inputs.turn_BT
  chex.assert_equal_shape([reward_BT, value_BT, sampled_BT, turn_BT])
  start_BT = turns.first(sampled_BT, turn_BT)
  total = functools.partial(
    turns.total, turn_BT=turn_BT, turns=inputs.num_turns
  )
  reward_BK, count_BK = total(reward_BT, sampled_BT)
  value_BK, _ = total(jax.lax.stop_gradient(value_BT), start_BT)
  advantage_BK, return_BK = advantages.gae(
    reward_BK, value_BK, count_BK > 0, discount=discount, lam=lam
  )
  advantage_BT = turns.spread(advantage_BK, sampled_BT, turn_BT)
  return Credit(
    advantages.whiten(advantage_BT, sampled_BT),
    turns.spread(return_BK, start_BT, turn_BT),
    start_BT,
  )


def _discounted(reward_BK: jax.Array, discount: float) -> jax.Array:
  """Discounted sum of the rewards from each turn on."""

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
) -> jax.Array:
  """Returns of turns relative to the mean over their group and anchor."""
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
    step_PN = step_PN / (std_PN + _EPS)
  scale_PN = jnp.maximum(jnp.abs(mean_PN), 1.0)
  differs_PN = exists_PN & (largest_PN > _ROUNDING * scale_PN)
  return jnp.where(differs_PN, step_PN, 0.0)


# --- By name -----------------------------------------------------------------


class Estimator(NamedTuple):
  """An estimator with its properties.

  Attributes:
    compute: (Inputs, numbers by keyword) -> Credit.
    algo: 'ppo' if the estimator needs a critic, else 'grpo'.
    compares_turns: bool, turns may differ where the returns of a group are
      equal, so that a step without spread is not skipped.
  """

  compute: Callable[..., Credit]
  algo: str
  compares_turns: bool = False


# advantage.estimator; the first of each algorithm is its default.
ESTIMATORS = {
  'group_relative': Estimator(group_relative, 'grpo'),
  'gigpo': Estimator(gigpo, 'grpo', compares_turns=True),
  'empg': Estimator(empg, 'grpo'),
  'gae': Estimator(gae, 'ppo'),
  'turn_gae': Estimator(turn_gae, 'ppo'),
}
