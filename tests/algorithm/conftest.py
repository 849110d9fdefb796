"""Ragged episodes in turns, for the tests of what works turn by turn."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import estimators

K = 4  # turns of the longest episode


@dataclasses.dataclass(frozen=True)
class Episodes:
  """The arrays of a batch, and where its turns are.

  `spans_B[row][k]` lists the sampled positions of turn k: the loops of the
  tests go by it and never by masks or turn indices.
  """

  arrays: dict
  spans_B: list

  def take(self, *names):
    """The named arrays, without their shape letters, on the device."""
    return [jnp.array(self.arrays[f'{name}_BT']) for name in names]

  def turn_rewards(self):
    """Reward of each turn of each row, as ragged lists of Python floats."""
    reward_BT = self.arrays['reward_BT'].astype(np.float64)
    return [
      [sum(reward_BT[row, t] for t in span_S) for span_S in spans_K]
      for row, spans_K in enumerate(self.spans_B)
    ]

  def returns(self):
    """Return of each row, Python floats."""
    return [sum(reward_K) for reward_K in self.turn_rewards()]

  def inputs(self, members=4, num_turns=K, **changes):
    """The inputs of an estimator; keywords replace a field."""
    names = ('reward', 'value', 'entropy', 'sampled', 'turn', 'anchor')
    return_PG = jnp.array(self.returns(), jnp.float32).reshape(-1, members)
    arrays = dict(
      zip([f'{name}_BT' for name in names], self.take(*names), strict=True)
    )
    fields = arrays | dict(return_PG=return_PG, num_turns=num_turns)
    return estimators.Inputs(**fields | changes)

  def paint(self, numbers_BK):
    """Each number on the sampled tokens of its turn, float64, 0 elsewhere."""
    out_BT = np.zeros(self.arrays['sampled_BT'].shape)
    for row, spans_K in enumerate(self.spans_B):
      for span_S, number in zip(spans_K, numbers_BK[row], strict=True):
        out_BT[row, span_S] = number
    return out_BT


def _write_row(rng, most_turns, states):
  """One row as a list of (sampled, turn, anchor, reward), and its spans."""
  row = [(False, -1, 0, 0.0)] * int(rng.integers(1, 4))
  spans_K = []
  for k in range(int(rng.integers(1, most_turns + 1))):
    anchor = int(rng.integers(states)) - 1
    row += [(False, k, anchor, 0.0)] * int(rng.integers(0, 3))
    span_S = []
    for s in range(int(rng.integers(1, 4))):
      if s and rng.random() < 0.4:  # A token that the policy was forced to.
        row.append((False, k, anchor, 0.0))
      span_S.append(len(row))
      row.append((True, k, anchor, 0.0))
    reward = rng.normal() if rng.random() < 0.7 else 0.0
    row[-1] = (True, k, anchor, reward)
    spans_K.append(span_S)
  return row, spans_K


def _play(seed, *, rows=8, most_turns=4, states=3):
  rng = np.random.default_rng(seed)
  drawn = [_write_row(rng, most_turns, states) for _ in range(rows)]
  # The longest that can be drawn: all seeds share one compilation.
  longest = 4 + 7 * most_turns
  pad = (False, -1, 0, 0.0)
  table = [row + [pad] * (longest - len(row)) for row, _ in drawn]
  sampled_BT, turn_BT, anchor_BT, reward_BT = np.moveaxis(
    np.array(table, np.float64), -1, 0
  )
  arrays = {
    'sampled_BT': sampled_BT > 0,
    'turn_BT': turn_BT.astype(np.int32),
    'anchor_BT': anchor_BT.astype(np.int32),
    'reward_BT': reward_BT.astype(np.float32),
    'value_BT': rng.normal(size=turn_BT.shape).astype(np.float32),
    'entropy_BT': rng.exponential(size=turn_BT.shape).astype(np.float32),
  }
  return Episodes(arrays, [spans_K for _, spans_K in drawn])


@pytest.fixture(name='play')
def _play_fixture():
  """(seed, rows, most_turns, states) -> Episodes."""
  return _play


@pytest.fixture(name='lengthen')
def _lengthen_fixture():
  """(episodes, seed) -> the same with garbage where nothing may be read.

  Rows are longer, and off the sampled tokens stand large turn indices, NaN and
  anchors that are equal to nothing in the batch.
  """

  def lengthen(episodes, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
      name: np.pad(x_BT, ((0, 0), (0, 7)))
      for name, x_BT in episodes.arrays.items()
    }
    off_BT = ~arrays['sampled_BT']
    off_BT[:, -1] = True
    for name in ('reward_BT', 'value_BT', 'entropy_BT'):
      arrays[name][off_BT] = np.nan
    for name in ('turn_BT', 'anchor_BT'):
      arrays[name][off_BT] = rng.integers(-9, 99, off_BT.sum())
    return Episodes(arrays, episodes.spans_B)

  return lengthen
