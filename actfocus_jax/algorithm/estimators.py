"""The advantage estimators by name, all called alike.

Each takes by keyword return_PG, reward_BT (on turn ends), value_BT (None
without a critic), entropy_BT (of the policy before the update), sampled_BT,
turn_BT and anchor_BT, uses what it needs, and returns a `Credit`. Their numbers
are bound beforehand, with `functools.partial`.
"""

from typing import Any, NamedTuple

import jax

from actfocus_jax.algorithm import advantages, turn_advantages

PLACEMENTS = ('final', 'turn')


class Credit(NamedTuple):
  """What the sampled tokens are credited with.

  Attributes:
    advantage_BT: 0 where not sampled.
    return_BT: target of the critic, or None without one.
    critic_BT: bool, the tokens at which the critic learns; None without one.
  """

  advantage_BT: jax.Array
  return_BT: jax.Array | None = None
  critic_BT: jax.Array | None = None


def group_relative(
  *,
  return_PG: jax.Array,
  sampled_BT: jax.Array,
  normalize_std: bool = True,
  **_: Any,
) -> Credit:
  """GRPO: see `advantages.group_relative`."""
  advantage_PG = advantages.group_relative(
    return_PG, normalize_std=normalize_std
  )
  return Credit(advantages.broadcast(advantage_PG.reshape(-1), sampled_BT))


def gae(
  *,
  reward_BT: jax.Array,
  value_BT: jax.Array,
  sampled_BT: jax.Array,
  reward_placement: str = 'final',
  discount: float = 1.0,
  lam: float = 1.0,
  **_: Any,
) -> Credit:
  """PPO: `advantages.gae`, whitened over the sampled tokens of the batch.

  `reward_placement` 'final' pays the whole return on the last sampled token,
  'turn' each reward on its turn end.

  Raises:
    ValueError: the placement is unknown.
  """
  if reward_placement not in PLACEMENTS:
    raise ValueError(
      f'reward_placement must be in {PLACEMENTS}, got {reward_placement!r}'
    )
  if reward_placement == 'final':
    reward_BT = advantages.on_last_token(reward_BT.sum(axis=1), sampled_BT)
  advantage_BT, return_BT = advantages.gae(
    reward_BT, value_BT, sampled_BT, discount=discount, lam=lam
  )
  white_BT = advantages.whiten(advantage_BT, sampled_BT)
  return Credit(white_BT, return_BT, sampled_BT)


def turn_gae(
  *,
  reward_BT: jax.Array,
  value_BT: jax.Array,
  sampled_BT: jax.Array,
  turn_BT: jax.Array,
  num_turns: int,
  discount: float = 0.99,
  lam: float = 0.9,
  **_: Any,
) -> Credit:
  """Turn-level PPO: `turn_advantages.turn_gae`, whitened likewise."""
  advantage_BT, return_BT, critic_BT = turn_advantages.turn_gae(
    reward_BT,
    value_BT,
    sampled_BT,
    turn_BT,
    num_turns=num_turns,
    discount=discount,
    lam=lam,
  )
  white_BT = advantages.whiten(advantage_BT, sampled_BT)
  return Credit(white_BT, return_BT, critic_BT)


def gigpo(
  *,
  return_PG: jax.Array,
  reward_BT: jax.Array,
  sampled_BT: jax.Array,
  turn_BT: jax.Array,
  anchor_BT: jax.Array,
  num_turns: int,
  normalize_std: bool = True,
  step_weight: float = 1.0,
  discount: float = 0.95,
  **_: Any,
) -> Credit:
  """GiGPO: see `turn_advantages.gigpo`."""
  return Credit(
    turn_advantages.gigpo(
      reward_BT,
      sampled_BT,
      turn_BT,
      anchor_BT,
      members=return_PG.shape[1],
      num_turns=num_turns,
      normalize_std=normalize_std,
      step_weight=step_weight,
      discount=discount,
    )
  )


def empg(
  *,
  return_PG: jax.Array,
  entropy_BT: jax.Array,
  sampled_BT: jax.Array,
  turn_BT: jax.Array,
  num_turns: int,
  normalize_std: bool = True,
  scale: float = 1.0,
  clarity_scale: float = 1.0,
  clarity_bonus: float = 0.1,
  **_: Any,
) -> Credit:
  """EMPG on GRPO: see `turn_advantages.entropy_modulated`."""
  outcome = group_relative(
    return_PG=return_PG, sampled_BT=sampled_BT, normalize_std=normalize_std
  )
  return Credit(
    turn_advantages.entropy_modulated(
      outcome.advantage_BT,
      entropy_BT,
      sampled_BT,
      turn_BT,
      num_turns=num_turns,
      scale=scale,
      clarity_scale=clarity_scale,
      clarity_bonus=clarity_bonus,
    )
  )


ESTIMATORS = {
  'group_relative': group_relative,
  'gae': gae,
  'gigpo': gigpo,
  'empg': empg,
  'turn_gae': turn_gae,
}
