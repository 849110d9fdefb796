"""The host's view of the slots, as arrays: a call costs the same for each."""

from collections.abc import Sequence

import numpy as np


class HostSlots:
  """Which episode is in each slot, and what its turn has sampled so far.

  Attributes:
    row_B: Index of the episode, -1 in a slot without one.
    length_B: Ids of the episode before this turn.
    count_B: Ids sampled in this turn.
    budget_B: Ids that the turn may have.
  """

  def __init__(self, slots: int, budget: int):
    """Slots without an episode.

    Args:
      slots: B.
      budget: The most ids of any turn.
    """
    self.row_B = np.full((slots,), -1, np.int32)
    self.length_B, self.count_B, self.budget_B = np.zeros((3, slots), np.int32)
    self._token_BT = np.zeros((slots, budget), np.int32)
    self._logprob_BT = np.zeros((slots, budget), np.float32)

  def __len__(self) -> int:
    return len(self.row_B)

  @property
  def live_B(self) -> np.ndarray:
    """Whether a slot has an episode."""
    return self.row_B >= 0

  @property
  def longest(self) -> int:
    """Ids of the longest episode in any slot."""
    return int((self.length_B + self.count_B)[self.live_B].max(initial=0))

  def start(self, slot: int, row: int, length: int, budget: int):
    """A turn of an episode begins."""
    self.row_B[slot], self.length_B[slot] = row, length
    self.count_B[slot], self.budget_B[slot] = 0, budget

  def leave(self, slot: int):
    """The episode is over."""
    self.row_B[slot] = -1

  def take(
    self,
    token_NB: np.ndarray,
    logprob_NB: np.ndarray,
    live_NB: np.ndarray,
    stop_ids: Sequence[int],
  ) -> np.ndarray:
    """Adds what a call to decode has sampled.

    Args:
      token_NB: The ids of N steps.
      logprob_NB: Of each.
      live_NB: Which of them count.
      stop_ids: Sampling one of these ends a turn.

    Returns:
      The slots whose turn has ended, in their order.
    """
    live_NB = live_NB & self.live_B
    has_stopped_B = np.zeros((len(self),), bool)
    for token_B, logprob_B, live_B in zip(
      token_NB, logprob_NB, live_NB, strict=True
    ):
      slots = live_B.nonzero()[0]
      place = self.count_B[slots]
      self._token_BT[slots, place] = token_B[slots]
      self._logprob_BT[slots, place] = logprob_B[slots]
      self.count_B[slots] += 1
      has_stopped_B[slots] = np.isin(token_B[slots], stop_ids)
    is_spent_B = self.count_B >= self.budget_B
    return (self.live_B & (has_stopped_B | is_spent_B)).nonzero()[0]

  def said(self, slot: int) -> tuple[list[int], list[float]]:
    """What the turn has sampled: ids, and the log-prob of each."""
    count = self.count_B[slot]
    return (
      self._token_BT[slot, :count].tolist(),
      self._logprob_BT[slot, :count].tolist(),
    )

  def keep(self, slots: Sequence[int]):
    """Keeps these slots, in this order."""
    for name, x in vars(self).items():
      setattr(self, name, x[np.asarray(slots)])
