"""Selection of the groups that are worth an update.

The score of a group is the standard deviation of the returns of its G members,
format penalties included; a group of equal returns has nothing to compare and
scores 0. `top_k` keeps a share of the groups: a number known before the run,
so the kept rows are a gather of static size under `jit`. `top_p` keeps as many
as it takes to hold a share of the total score. The kept groups stay in the
order they had.

Source: StarPO-S, arXiv 2504.20073, as used by arXiv 2605.14558.
"""

import math

import chex
import jax
import jax.numpy as jnp

RULES = ('top_k', 'top_p')

# Sums of a few float32 rewards agree to about this much when they ought to be
# equal. It is relative to the returns, or absolute where these are small: 1.0
# minus ten times 0.1 is 0 up to the rounding of numbers of size 1.
_ROUNDING = 1e-6


def group_spread(return_PG: jax.Array) -> jax.Array:
  """Standard deviation of the returns within each group, unbiased.

  Returns score_P, float32, in units of the return; exactly 0 when returns
  differ by rounding only (range within 1e-6 of the largest magnitude, or of 1
  if that is larger), and for groups of one.
  """
  chex.assert_rank(return_PG, 2)
  return_PG = return_PG.astype(jnp.float32)
  range_P = jnp.max(return_PG, axis=1) - jnp.min(return_PG, axis=1)
  scale_P = jnp.maximum(jnp.max(jnp.abs(return_PG), axis=1), 1.0)
  centered_PG = return_PG - jnp.mean(return_PG, axis=1, keepdims=True)
  degrees = max(return_PG.shape[1] - 1, 1)
  std_P = jnp.sqrt(jnp.sum(jnp.square(centered_PG), axis=1) / degrees)
  return jnp.where(range_P > _ROUNDING * scale_P, std_P, 0.0)


def kept_count(num_groups: int, ratio: float) -> int:
  """Number of groups that `top_k` keeps: `ceil(ratio * P)`.

  Raises:
    ValueError: the ratio is out of range.
  """
  if not 0 < ratio <= 1:
    raise ValueError(f'ratio must be in (0, 1], got {ratio}')
  # 0.07 * 100 is 7.000000000000001 in floating point, and must give 7.
  return max(1, math.ceil(ratio * num_groups - 1e-9))


def keep_groups(
  return_PG: jax.Array, *, ratio: float, rule: str = 'top_k'
) -> jax.Array:
  """Mark the groups to train on: bool [P].

  Args:
    return_PG: returns of the G members of P groups.
    ratio: in (0, 1]; the share of the groups (`top_k`) or of the summed
      standard deviations (`top_p`, to a relative 1e-6) to keep.
    rule: `top_k` keeps exactly `kept_count(P, ratio)` groups, those of the
      largest spread, even if some have no spread; `top_p` keeps the smallest
      set that holds the share, so no group if none has spread. Among equals
      the earlier group is kept.

  Raises:
    ValueError: the ratio is out of range or the rule is unknown.
  """
  if rule not in RULES:
    raise ValueError(f'rule must be one of {RULES}, got {rule!r}')
  count = kept_count(return_PG.shape[0], ratio)
  score_P = group_spread(return_PG)
  order_P = _by_spread(score_P)
  if rule == 'top_k':
    return jnp.zeros_like(score_P, bool).at[order_P[:count]].set(True)
  held_P = jnp.cumsum(score_P[order_P])
  # A set that holds the share but for rounding holds it. Ahead of a group
  # without spread all of it is held, so such a group is never kept.
  share = ratio * held_P[-1] * (1 - 1e-6)
  keep_P = held_P - score_P[order_P] < share
  return jnp.zeros_like(keep_P).at[order_P].set(keep_P)


def kept_rows(return_PG: jax.Array, *, ratio: float) -> jax.Array:
  """Rows of the groups that `top_k` keeps, as indices for a gather.

  Member g of group p is row p * G + g of the batch. Returns index_B, int32, of
  static length `kept_count(P, ratio) * G`, ascending: the kept groups in their
  original order, each with all its members.

  Raises:
    ValueError: the ratio is out of range.
  """
  order_P = _by_spread(group_spread(return_PG))
  num_groups, num_members = return_PG.shape
  group_P = jnp.sort(order_P[: kept_count(num_groups, ratio)])
  index_PG = group_P[:, None] * num_members + jnp.arange(num_members)[None, :]
  return index_PG.reshape(-1)


def _by_spread(score_P: jax.Array) -> jax.Array:
  """Group indices, the largest score first, the earlier group among equals."""
  return jnp.argsort(-score_P, stable=True)
