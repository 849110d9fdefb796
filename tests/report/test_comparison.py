"""The comparison of arms: its intervals by hand, and its ranking."""

import math
import statistics

import pytest

from actfocus_jax.report import comparison


def test_mean_interval_by_hand():
  """1, 2, 3: s = 1, so 2 -+ 4.303 / sqrt(3)."""
  mean = comparison.mean_interval([1.0, 2.0, 3.0])
  half = 4.303 / math.sqrt(3)
  assert mean == pytest.approx((2.0, 2.0 - half, 2.0 + half))
  assert comparison.mean_interval([0.5]) == (0.5, None, None)


def test_mean_interval_quantiles_fall_towards_the_normal():
  widths = [
    comparison.mean_interval([0.0, 1.0] * n).high - 0.5 for n in range(1, 20)
  ]
  scaled = [
    w * math.sqrt(2 * n) / statistics.stdev([0.0, 1.0] * n)
    for n, w in enumerate(widths, 1)
  ]
  scaled = [round(x, 9) for x in scaled]
  assert scaled == sorted(scaled, reverse=True)
  # Beyond the table the quantile of 30 is kept: too wide, not too narrow.
  assert (scaled[0], scaled[-1]) == pytest.approx((12.706, 2.042))


def rows(*successes):
  return [{'step': 10 * i, 'success': x} for i, x in enumerate(successes)]


RESULTS = {
  'uniform': {0: rows(0.4, 0.5), 1: rows(0.4, 0.6), 2: rows(0.4, 0.7)},
  'actfocus': {0: rows(0.4, 0.9, 0.8), 1: rows(0.4, 0.8, 0.8)},
  'downweight': {},
}


def test_table_ranks_by_mean_with_differences():
  lines = comparison.table(RESULTS).splitlines()
  assert lines[0] == 'Held-out success after 10 or 20 steps:'
  body = [line for line in lines if line.startswith('| ')][1:]
  names = [line.split('|')[1].strip() for line in body]
  assert names == ['actfocus', 'uniform']
  first = [cell.strip() for cell in body[0].split('|')[1:-1]]
  assert first[1:4] == ['2', '80.0%, 80.0%', '80.0%']
  # Welch: a = 0, b = 0.01 / 3, so 2 degrees; half = 4.303 * sqrt(b).
  assert first[5] == '+20.0 points (-4.8 to +44.8)'
  assert first[6:] == ['82.5%', '5.0 points']
  second = [cell.strip() for cell in body[1].split('|')[1:-1]]
  assert second[4] == '35.2% to 84.8%' and second[5] == '-'


def test_table_intervals_end_at_0_and_1():
  two = {'a': {0: rows(0.9), 1: rows(1.0)}, 'b': {0: rows(0.0), 1: rows(0.1)}}
  cells = [
    line.split('|')[5].strip()
    for line in comparison.table(two).splitlines()
    if line.startswith('|')
  ]
  assert cells[2:] == ['31.5% to 100.0%', '0.0% to 68.5%']


def test_difference_interval_by_hand():
  """Variances 2 and 1/2 of two runs: a = 1, b = 1/4, 1.25^2 / 1.0625 = 1.47."""
  difference = comparison.difference_interval([1.0, 3.0], [0.0, 1.0])
  half = 12.706 * math.sqrt(1.25)
  assert difference == pytest.approx((1.5, 1.5 - half, 1.5 + half))
  assert comparison.difference_interval([1.0], [0.0, 1.0]).low is None
  assert comparison.difference_interval([1, 1], [0, 0]) == (1, 1, 1)


def test_difference_interval_equal_variances_have_all_degrees():
  """Welch's of two equal samples is Student's with m + n - 2 = 4 degrees."""
  runs = [1.0, 2.0, 3.0]
  difference = comparison.difference_interval(runs, runs)
  assert difference.high == pytest.approx(2.776 * math.sqrt(2 / 3))


def test_table_marks_a_stalled_run():
  stalled = [*rows(0.4, 0.5), {'step': 17, 'success': 1.0, 'stalled': True}]
  text = comparison.table({'a': {0: stalled}, 'b': {0: rows(0.4, 0.5)}})
  assert '| 100.0% at 17* |' in text
  assert '\n* nothing left to learn from at that step\n' in text
  assert '*' not in comparison.table(RESULTS)


def test_table_without_finished_runs_is_refused():
  with pytest.raises(ValueError, match='no arm has a finished run'):
    comparison.table({'uniform': {}})


def test_curve_has_mean_and_range_at_shared_steps():
  start, end = comparison._curve({0: rows(0.4, 0.6, 0.8), 1: rows(0.2, 0.8)})
  assert start['success'] == pytest.approx(0.3)
  assert end == pytest.approx(
    {'step': 10, 'success': 0.7, 'success_low': 0.6, 'success_high': 0.8}
  )


def test_picture_is_written(tmp_path):
  comparison.picture(RESULTS, path=tmp_path / 'x.png')
  assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')
