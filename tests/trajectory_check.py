"""Check that a batch keeps the promises of `Trajectory`, on the host."""

import jax
import numpy as np

from actfocus_jax.algorithm import trajectory

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


def check_trajectory(batch: trajectory.Trajectory) -> None:
  """Raise ValueError that names the first broken promise and its place."""
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


def _check_layout(x: trajectory.Trajectory) -> None:
  """Raise ValueError unless all fields have their shapes and types."""
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
  """Mark sampled tokens after which no other of their turn is sampled."""
  last_BT = np.zeros_like(sampled_BT)
  later_turn_B = np.full(len(sampled_BT), -1)
  for t in reversed(range(sampled_BT.shape[1])):
    last_BT[:, t] = sampled_BT[:, t] & (turn_BT[:, t] != later_turn_B)
    later_turn_B = np.where(sampled_BT[:, t], turn_BT[:, t], later_turn_B)
  return last_BT
