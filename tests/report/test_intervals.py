"""Intervals by hand, against a search, and in known cases."""

import math

import numpy as np
import pytest

from actfocus_jax.report import intervals


def test_wilson_by_hand():
  # z^2 = 3.8414588. No success of 10: high = z^2 / (n + z^2) = 3.8414588 /
  # 13.8414588. Five of 10: the centre is 0.5 and half the width is
  # 1.959964 sqrt(0.025 + 0.0096036) / 1.3841459 = 0.2634069.
  cases = {0: (0.0, 0.2775328), 5: (0.2365931, 0.7634069), 10: (0.7224672, 1.0)}
  for successes, golden in cases.items():
    got = intervals.wilson(successes, 10)
    np.testing.assert_allclose(got, golden, atol=1e-7)


def test_wilson_is_exact_at_both_ends():
  for n in range(1, 200):
    assert intervals.wilson(0, n)[0] == 0.0
    assert intervals.wilson(n, n)[1] == 1.0


def test_wilson_contains_what_the_score_test_accepts():
  successes, n = 7, 40
  grid = np.linspace(0, 1, 1_000_001)[1:-1]
  z = np.abs(successes / n - grid) / np.sqrt(grid * (1 - grid) / n)
  accepted = grid[z <= 1.959963984540054]
  low, high = intervals.wilson(successes, n)
  np.testing.assert_allclose([low, high], accepted[[0, -1]], atol=2e-6)


def test_wilson_without_trials_or_with_too_many_successes():
  assert intervals.wilson(0, 0) == (0.0, 1.0)
  for successes in (-1, 11):
    with pytest.raises(ValueError, match='of 10 trials'):
      intervals.wilson(successes, 10)


def test_newcombe_matches_his_own_examples():
  # Newcombe (1998), table II, method 10.
  cases = [
    ((56, 70, 48, 80), (0.2, 0.0524, 0.3339)),
    ((9, 10, 3, 10), (0.6, 0.1705, 0.8090)),
    ((10, 10, 0, 10), (1.0, 0.6075, 1.0)),
    ((5, 56, 0, 29), (0.0893, -0.0381, 0.1926)),
  ]
  for counts, golden in cases:
    got = intervals.newcombe(*counts)
    np.testing.assert_allclose(got, golden, atol=5e-5)


def test_newcombe_swapped_changes_sign():
  change, low, high = intervals.newcombe(30, 64, 12, 50)
  other = intervals.newcombe(12, 50, 30, 64)
  np.testing.assert_allclose(other, (-change, -high, -low), rtol=1e-12)
  with pytest.raises(ValueError, match='no trials'):
    intervals.newcombe(1, 2, 0, 0)


def test_z95_is_the_quantile():
  assert math.erf(intervals.Z95 / math.sqrt(2)) == pytest.approx(
    0.95, abs=1e-15
  )
