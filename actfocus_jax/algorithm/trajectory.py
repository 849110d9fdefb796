"""The one batch type, and the masked reductions that every stage shares.

The life of one row of a `Trajectory`:

1. The rollout writes the tokens of an episode from left to right: the system
   prompt, then for each turn the observation and what the policy answered.
2. With each token it writes who wrote it (`sampled`), whether the environment
   acted on it (`action`), its `turn`, and for sampled tokens the `logprob`.
3. When a turn ends, `turn_end` and the `reward` of that turn are set on its
   last sampled token; when the episode ends, `success`.
4. The row is padded on the right. Nothing rewrites it after that: masks are
   read, never computed again from ids or rewards.
5. Each loss and statistic reduces it to a (sum, count) pair. Pairs are added
   over micro-batches and divided once, at the end.
"""

import chex
import flax.struct
import jax
import jax.numpy as jnp

# Below every count that carries a gradient (one token of weight 1e-3, say),
# above zero: it only serves to make 0 / 0 equal 0.
_COUNT_FLOOR = 1e-8


@flax.struct.dataclass
class Trajectory:
  """Episodes of the policy; a pytree that crosses `jit`.

  Alignment: entry [:, t] of every array describes token t. A log-probability
  at t is that of token t given the tokens before it, hence 0 at t = 0; the
  shift by one between logits and tokens exists only where tokens are scored.

  Provenance: ids are kept as they were sampled, nothing is decoded and encoded
  again, and who wrote a token is recorded when it is written.

  Attributes:
    tokens: [B, T] int32, token ids, padded on the right.
    valid: [B, T] bool, not padding; a prefix of each row.
    sampled: [B, T] bool, written by the policy, its stop token included: the
      loss mask. False for prompts, observations and forced tokens.
    action: [B, T] bool, inside the answer that the environment executed; a
      subset of `sampled`.
    turn: [B, T] int32, index of the turn from 0; -1 on the system prompt and on
      padding.
    turn_end: [B, T] bool, the last sampled token of each turn.
    anchor: [B, T] int32, number of the environment's state at the beginning of
      the turn: equal states have equal numbers; 0 outside of turns.
    logprob: [B, T] float32, nats, log-probability of the token under the
      policy that sampled it at the sampling temperature; 0 where not sampled.
    reward: [B, T] float32, reward of a turn, on its turn end; 0 elsewhere. A
      row without a sampled token is of an episode that was lost: it has the
      mean return of the others of its group, on any valid token.
    group: [B] int32, which prompt the row answers. Rows are group-major: row
      p * G + g is member g of group p.
    success: [B] bool, the episode reached its goal.
  """

  tokens: jax.Array
  valid: jax.Array
  sampled: jax.Array
  action: jax.Array
  turn: jax.Array
  turn_end: jax.Array
  anchor: jax.Array
  logprob: jax.Array
  reward: jax.Array
  group: jax.Array
  success: jax.Array


def masked_sum_count(
  x_BT: jax.Array, mask_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Sum of `x` over the mask, and the number of entries in it.

  Entries off the mask may hold anything, NaN included: they are replaced, not
  multiplied by zero, so neither they nor their gradients get through. `x` has
  any type and shape; sum and count are float32 scalars.
  """
  chex.assert_equal_shape([x_BT, mask_BT])
  chex.assert_type(mask_BT, bool)
  x_BT = jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)
  return jnp.sum(x_BT), jnp.sum(mask_BT, dtype=jnp.float32)


def divide(total: jax.Array, count: jax.Array) -> jax.Array:
  """`total / count`, where 0 / 0 is 0: the mean over no tokens is 0."""
  return total / jnp.maximum(count, _COUNT_FLOOR)


def masked_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """Mean of `x` over the mask, float32; 0 when the mask is empty."""
  return divide(*masked_sum_count(x_BT, mask_BT))


def masked_moments(
  x_BT: jax.Array, mask_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mean and population variance over the mask, float32; 0 when it is empty."""
  x_BT = x_BT.astype(jnp.float32)
  mean = masked_mean(x_BT, mask_BT)
  # The mean of n equal float32 numbers is off by some 1e-7; dividing by a
  # standard deviation floored at 1e-4 would make 1e-3 of it. The mean of the
  # residual takes it out: equal numbers then deviate by exactly 0.
  mean = mean + masked_mean(x_BT - mean, mask_BT)
  return mean, masked_mean(jnp.square(x_BT - mean), mask_BT)


def episode_return(batch: Trajectory) -> jax.Array:
  """Undiscounted return of each row, the sum of its rewards: float32 [B]."""
  return jnp.sum(batch.reward, axis=1)


def take_rows(batch: Trajectory, index_B: jax.Array) -> Trajectory:
  """The rows at `index_B` (int32, all in range), in that order."""
  return jax.tree.map(lambda x: jnp.take(x, index_B, axis=0), batch)
