"""Host-side bookkeeping of the slots, in NumPy arrays."""

from collections.abc import Sequence

import numpy as np


class HostSlots:
  """The episode in each slot and the ids that its turn has sampled so far.

  Attributes:
    row_B: row of the episode, -1 in a slot without one.
    length_B: number of ids of the episode before this response.
    count_B: number of ids sampled in this turn.
    budget_B: largest number of ids in this turn.
  """

  def __init__(self, slots: int, budget: int):
    """Create slots without an episode; a turn has at most `budget` ids."""
    self.row_B = np.full((slots,), -1, np.int32)
    self.length_B, self.count_B, self.budget_B = np.zeros((3, slots), np.int32)
    self._token_BT = np.zeros((slots, budget), np.int32)
    self._logprob_BT = np.zeros((slots, budget), np.float32)

  def __len__(self) -> int:
    return len(self.row_B)

  @property
  def live_B(self) -> np.ndarray:
    """Mask of the slots that have an episode."""
    return self.row_B >= 0

  @property
  def longest(self) -> int:
    """Number of ids in the longest episode of any slot."""
    return int((self.length_B + self.count_B)[self.live_B].max(initial=0))

  def start(self, slot: int, row: int, length: int, budget: int):
    """Begin a turn of an episode."""
    self.row_B[slot], self.length_B[slot] = row, length
    self.count_B[slot], self.budget_B[slot] = 0, budget

  def leave(self, slot: int):
    """Free the slot of a finished episode."""
    self.row_B[slot] = -1

  def take(
    self,
    token_NB: np.ndarray,
    logprob_NB: np.ndarray,
    live_NB: np.ndarray,
    stop_ids: Sequence[int],
  ) -> np.ndarray:
    """Add the ids of N decode steps; `live_NB` marks those that count.

    Returns:
      The slots whose turn has ended, ascending.
    """
    live_NB = live_NB & self.live_B
    has_stopped_B = np.zeros((len(self),), bool)
    for token_B, logprob_B, live_B in zip(
      token_NB, logprob_NB, live_NB, strict=True
    ):
      slots = live_B.nonzero()[0]
      index = self.count_B[slots]
      self._token_BT[slots, index] = token_B[slots]
      self._logprob_BT[slots, index] = logprob_B[slots]
      self.count_B[slots] += 1
      has_stopped_B[slots] = np.isin(token_B[slots], stop_ids)
    is_spent_B = self.count_B >= self.budget_B
    return (self.live_B & (has_stopped_B | is_spent_B)).nonzero()[0]

  def sampled(self, slot: int) -> tuple[list[int], list[float]]:
    """Return the ids that the turn has sampled, and their log-probs."""
    count = self.count_B[slot]
    return (
      self._token_BT[slot, :count].tolist(),
      self._logprob_BT[slot, :count].tolist(),
    )

  def keep(self, slots: Sequence[int]):
    """Keep these slots, in this order."""
    for name, x in vars(self).items():
      setattr(self, name, x[np.asarray(slots)])
