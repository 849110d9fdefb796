"""Numbers per turn: from the tokens of a turn to one number, and back.

K (`turns`) is a static number of turns, at least as many as any episode has. A
turn that an episode does not have is 0 everywhere here. `turn_BT` is the int32
index of each token's turn; it is read where the mask is set.
"""

import chex
import jax
import jax.numpy as jnp

from actfocus_jax.algorithm import trajectory


def total(
  x_BT: jax.Array, mask_BT: jax.Array, turn_BT: jax.Array, *, turns: int
) -> tuple[jax.Array, jax.Array]:
  """Sum over the masked tokens of each turn, and how many there are.

  Off the mask `x` may hold anything. Returns (sum_BK, count_BK), float32.
  """
  chex.assert_equal_shape([x_BT, mask_BT, turn_BT])
  chex.assert_type(mask_BT, bool)
  x_BT = jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)
  here_BTK = _here(mask_BT, turn_BT, turns)
  # float32 on every platform: the factors are 0 and 1, the sum is exact.
  sum_BK = jnp.sum(jnp.where(here_BTK, x_BT[:, :, None], 0.0), axis=1)
  return sum_BK, jnp.sum(here_BTK, axis=1, dtype=jnp.float32)


def mean(
  x_BT: jax.Array, mask_BT: jax.Array, turn_BT: jax.Array, *, turns: int
) -> jax.Array:
  """Mean over the masked tokens of each turn: float32 [B, K].

  It is 0 for a turn without masked tokens.
  """
  return trajectory.divide(*total(x_BT, mask_BT, turn_BT, turns=turns))


def first(mask_BT: jax.Array, turn_BT: jax.Array) -> jax.Array:
  """Mark the first masked token of each turn: bool [B, T]."""
  # A masked token is the first one unless the last masked token before it is
  # of the same turn.
  latest_BT = jax.lax.cummax(jnp.where(mask_BT, turn_BT, -1), axis=1)
  before_BT = jnp.pad(latest_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  return mask_BT & (turn_BT > before_BT)


def pick(
  x_BT: jax.Array, first_BT: jax.Array, turn_BT: jax.Array, *, turns: int
) -> jax.Array:
  """The entry of the one marked token of each turn, in its own type: [B, K]."""
  here_BTK = _here(first_BT, turn_BT, turns)
  zero = jnp.zeros((), x_BT.dtype)
  return jnp.sum(jnp.where(here_BTK, x_BT[:, :, None], zero), axis=1)


def spread(
  x_BK: jax.Array, mask_BT: jax.Array, turn_BT: jax.Array
) -> jax.Array:
  """Put the number of a turn on its masked tokens: float32 [B, T], else 0."""
  index_BT = jnp.clip(turn_BT, 0, x_BK.shape[1] - 1)
  taken_BT = jnp.take_along_axis(x_BK.astype(jnp.float32), index_BT, axis=1)
  return jnp.where(mask_BT, taken_BT, 0.0)


def own_logprob(
  logprob_BT: jax.Array,
  sampled_BT: jax.Array,
  turn_BT: jax.Array,
  *,
  num_turns: int,
) -> jax.Array:
  """Return each token's own log-probability."""
  del sampled_BT, turn_BT, num_turns
  return logprob_BT


def turn_logprob(
  logprob_BT: jax.Array,
  sampled_BT: jax.Array,
  turn_BT: jax.Array,
  *,
  num_turns: int,
) -> jax.Array:
  """Mean log-probability of the turn, on each of its sampled tokens."""
  mean_BK = mean(logprob_BT, sampled_BT, turn_BT, turns=num_turns)
  return spread(mean_BK, sampled_BT, turn_BT)


# learner.ratio -> log-probabilities of which the importance ratio is made.
LOGPROB_POOLINGS = {'token': own_logprob, 'turn': turn_logprob}


def _here(mask_BT: jax.Array, turn_BT: jax.Array, turns: int) -> jax.Array:
  index_11K = jnp.arange(turns)[None, None, :]
  return mask_BT[:, :, None] & (turn_BT[:, :, None] == index_11K)
