"""The host's view of the slots: by hand, and against one list a slot."""

import numpy as np
import pytest

from actfocus_jax.rollout import host_slots as host_slots_lib

STOP = (7, 9)


def test_two_turns_by_hand():
  """Slot 0 stops, slot 1 spends its budget, slot 2 is idle."""
  host_slots = host_slots_lib.HostSlots(3, budget=4)
  assert host_slots.longest == 0 and not host_slots.live_B.any()
  host_slots.start(0, row=5, length=10, budget=4)
  host_slots.start(1, row=6, length=20, budget=2)
  token_NB = np.array([[1, 2, 3], [7, 4, 3], [7, 4, 3]])
  live_NB = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
  ended = host_slots.take(token_NB, -0.5 * token_NB, live_NB, STOP)
  assert ended.tolist() == [0, 1]
  assert host_slots.sampled(0) == ([1, 7], [-0.5, -3.5])
  assert host_slots.sampled(1) == ([2, 4], [-1.0, -2.0])
  assert host_slots.longest == 22
  host_slots.leave(1)
  host_slots.start(0, row=5, length=15, budget=4)
  assert host_slots.sampled(0) == ([], []) and host_slots.longest == 15
  host_slots.keep([2, 0])
  assert host_slots.row_B.tolist() == [-1, 5] and len(host_slots) == 2


@pytest.mark.parametrize('seed', range(2))
def test_random_turns_match_one_list_per_slot(seed):
  """Random turns, several calls each; the loop keeps lists."""
  rng = np.random.default_rng(seed)
  slots, budget = 6, 5
  host_slots = host_slots_lib.HostSlots(slots, budget)
  said: list[list[int]] = [[] for _ in range(slots)]
  budgets = rng.integers(1, budget + 1, slots)
  for slot in range(slots):
    host_slots.start(slot, row=slot, length=slot, budget=budgets[slot])
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
    found = host_slots.take(token_NB, token_NB * 0.1, live_NB, STOP)
    assert found.tolist() == ended
    assert host_slots.longest == max(
      s + len(said[s]) for s in range(slots) if s not in over
    )
    for slot in ended:
      ids, logprobs = host_slots.sampled(slot)
      assert ids == said[slot]
      np.testing.assert_allclose(logprobs, np.multiply(ids, 0.1), rtol=1e-6)
      host_slots.leave(slot)
    over.update(ended)
