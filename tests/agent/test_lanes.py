"""The host's view of the slots: by hand, and against one list a slot."""

import numpy as np
import pytest

from actfocus_jax.rollout import host_slots as host_slots_lib

STOP = (7, 9)


def test_two_turns_by_hand():
  """Slot 0 stops, slot 1 spends its budget, slot 2 is idle."""
  lanes = host_slots_lib.HostSlots(3, budget=4)
  assert lanes.longest == 0 and not lanes.live_B.any()
  lanes.start(0, row=5, length=10, budget=4)
  lanes.start(1, row=6, length=20, budget=2)
  token_NB = np.array([[1, 2, 3], [7, 4, 3], [7, 4, 3]])
  live_NB = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
  ended = lanes.take(token_NB, -0.5 * token_NB, live_NB, STOP)
  assert ended.tolist() == [0, 1]
  assert lanes.said(0) == ([1, 7], [-0.5, -3.5])
  assert lanes.said(1) == ([2, 4], [-1.0, -2.0])
  assert lanes.longest == 22
  lanes.leave(1)
  lanes.start(0, row=5, length=15, budget=4)
  assert lanes.said(0) == ([], []) and lanes.longest == 15
  lanes.keep([2, 0])
  assert lanes.row_B.tolist() == [-1, 5] and len(lanes) == 2


def test_what_an_idle_slot_emits_is_not_taken():
  lanes = host_slots_lib.HostSlots(2, budget=1)
  lanes.start(1, row=0, length=1, budget=1)
  ones = np.ones((1, 2), bool)
  assert lanes.take(ones * 3, ones * 0.0, ones, STOP).tolist() == [1]
  assert lanes.said(0) == ([], [])


@pytest.mark.parametrize('seed', range(5))
def test_a_list_for_each_slot_says_the_same(seed):
  """Random turns, several calls each; the loop keeps lists."""
  rng = np.random.default_rng(seed)
  slots, budget = 6, 5
  lanes = host_slots_lib.HostSlots(slots, budget)
  said: list[list[int]] = [[] for _ in range(slots)]
  budgets = rng.integers(1, budget + 1, slots)
  for slot in range(slots):
    lanes.start(slot, row=slot, length=slot, budget=budgets[slot])
  over: set[int] = set()
  while len(over) < slots:
    token_NB = rng.integers(0, 10, (2, slots))
    live_NB = np.zeros((2, slots), bool)
    ended = []
    for slot in set(range(slots)) - over:
      for step in range(2):
        live_NB[step, slot] = True
        said[slot].append(int(token_NB[step, slot]))
        if said[slot][-1] in STOP or len(said[slot]) == budgets[slot]:
          ended.append(slot)
          break
    found = lanes.take(token_NB, token_NB * 0.1, live_NB, STOP)
    assert found.tolist() == ended
    assert lanes.longest == max(
      s + len(said[s]) for s in range(slots) if s not in over
    )
    for slot in ended:
      ids, logprobs = lanes.said(slot)
      assert ids == said[slot]
      np.testing.assert_allclose(logprobs, np.multiply(ids, 0.1), rtol=1e-6)
      lanes.leave(slot)
    over.update(ended)
