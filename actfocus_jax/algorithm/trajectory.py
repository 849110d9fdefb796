"""The one batch type, and the masked reductions that every stage shares.

The life of one row of a `Trajectory`:

1. The rollout writes the tokens of an episode from left to right: the system
   prompt, then for each turn the observation and what the policy answered.
2. With each token it writes who wrote it (`sampled`), whether the environment
   acted on it (`action`), its `turn`, and for sampled tokens the `logprob`.
3. When a turn ends, `turn_end` and the `reward` of that turn are set on its
   last sampled token; when the episode ends, `success`.
4. The row is padded on the right. From here on nothing rewrites it: masks are
   read, never worked out again from ids or rewards.
5. Each loss and statistic reduces it to a (sum, count) pair. Pairs are added
   over micro-batches and divided once, at the end.
"""

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# Below every count that carries a gradient (one token of weight 1e-3, say),
# above zero: it only serves to make 0 / 0 equal 0.
_COUNT_FLOOR = 1e-8

_DTYPES = {
  'tokens': np.int32,
  'valid': np.bool_,
  'sampled': np.bool_,
  'action': np.bool_,
  'turn': np.int32,
  'turn_end': np.bool_,
  'anchor': np.int32,
  'logprob': np.float32,
  'reward': np.float32,
  'group': np.int32,
  'success': np.bool_,
}
_PER_ROW = ('group', 'success')


@flax.struct.dataclass
class Trajectory:
  """Episodes as the policy lived them; a pytree that crosses `jit`.

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
    anchor: [B, T] int32, what the environment's state at the beginning of the
      turn is told by: equal states have equal ones; 0 outside of turns.
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
  multiplied by zero, so neither they nor their gradients get through.

  Args:
    x_BT: values, any floating type and shape.
    mask_BT: bool, of the same shape.

  Returns:
    (sum, count), float32 scalars.

  Raises:
    AssertionError: the shapes differ or the mask is not bool.
  """
  chex.assert_equal_shape([x_BT, mask_BT])
  chex.assert_type(mask_BT, bool)
  x_BT = jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)
  return jnp.sum(x_BT), jnp.sum(mask_BT, dtype=jnp.float32)


def divide(total: jax.Array, count: jax.Array) -> jax.Array:
  """`total / count`, where 0 / 0 is 0: a mean over nothing is no loss."""
  return total / jnp.maximum(count, _COUNT_FLOOR)


def masked_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """Mean of `x` over the mask, float32; 0 when the mask is empty."""
  return divide(*masked_sum_count(x_BT, mask_BT))


def masked_moments(
  x_BT: jax.Array, mask_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mean and population variance of `x` over the mask.

  Args:
    x_BT: values, any floating type and shape.
    mask_BT: bool, of the same shape.

  Returns:
    (mean, variance), float32 scalars; both 0 when the mask is empty.

  Raises:
    AssertionError: the shapes differ or the mask is not bool.
  """
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


def check(batch: Trajectory) -> None:
  """Checks on the host that a batch keeps the promises of its docstring.

  Args:
    batch: concrete arrays, of NumPy or on devices of this process.

  Raises:
    ValueError: in one sentence, the first promise that is broken and where.
  """
  x = jax.tree.map(np.asarray, batch)
  _check_layout(x)
  first_BT = np.zeros_like(x.valid)
  first_BT[:, :1] = True
  so_far_valid_BT = np.logical_and.accumulate(x.valid, axis=1)
  is_lost_B1 = ~x.sampled.any(axis=1, keepdims=True)
  off_end_BT = np.where(is_lost_B1, ~x.valid, ~x.turn_end)
  earlier_turn_BT = np.maximum.accumulate(x.turn, axis=1)
  for broken_BT, sentence in (
    (x.valid & ~so_far_valid_BT, 'valid is not a prefix of the row'),
    (x.sampled & ~x.valid, 'a sampled token is not valid'),
    (x.action & ~x.sampled, 'an action token is not sampled'),
    (x.sampled & first_BT, 'the first token has no prediction but is sampled'),
    (~x.valid & (x.turn != -1), 'turn is not -1 on padding'),
    (x.turn < -1, 'turn is below -1'),
    (x.sampled & (x.turn < 0), 'a sampled token belongs to no turn'),
    (x.valid & (x.turn < earlier_turn_BT), 'turn decreases along the row'),
    (
      x.turn_end != _last_of_turn(x.sampled, x.turn),
      'turn_end is not exactly the last sampled token of each turn',
    ),
    (off_end_BT & (x.reward != 0), 'a reward stands off the turn ends'),
    (~np.isfinite(x.reward), 'a reward is not finite'),
    (~np.isfinite(x.logprob), 'a logprob is not finite'),
    (~x.sampled & (x.logprob != 0), 'a token not sampled has a logprob'),
  ):
    if broken_BT.any():
      row, token = np.argwhere(broken_BT)[0].tolist()
      raise ValueError(f'{sentence}: row {row}, token {token}')


def _check_layout(x: Trajectory) -> None:
  """Raises ValueError unless all fields have their shapes and types."""
  if x.tokens.ndim != 2:
    raise ValueError(f'tokens has shape {x.tokens.shape}, not [B, T]')
  for name, dtype in _DTYPES.items():
    value = getattr(x, name)
    shape = x.tokens.shape[:1] if name in _PER_ROW else x.tokens.shape
    if value.shape != shape:
      raise ValueError(f'{name} has shape {value.shape}, not {shape}')
    if value.dtype != dtype:
      raise ValueError(f'{name} is {value.dtype}, not {np.dtype(dtype)}')


def _last_of_turn(sampled_BT: np.ndarray, turn_BT: np.ndarray) -> np.ndarray:
  """Marks sampled tokens after which no other of their turn is sampled."""
  last_BT = np.zeros_like(sampled_BT)
  later_turn_B = np.full(len(sampled_BT), -1)
  for t in reversed(range(sampled_BT.shape[1])):
    last_BT[:, t] = sampled_BT[:, t] & (turn_BT[:, t] != later_turn_B)
    later_turn_B = np.where(sampled_BT[:, t], turn_BT[:, t], later_turn_B)
  return last_BT
