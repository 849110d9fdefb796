"""Comparison of several arms over several seeds, with intervals.

The unit is a run: its last held-out success. Episodes within a run measure that
policy; only several runs measure the method. The interval of a mean is
Student's over seeds. That of a difference is Welch's: a seed changes only what
is sampled, so runs of one seed are not paired. All runs share one warm start
and one set of boards, whose variation no interval contains.
"""

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from actfocus_jax.report import plots, summary

Rows = Sequence[Mapping[str, Any]]  # of eval.jsonl, the first before training
Runs = Mapping[int, Rows]  # seed -> rows
Results = Mapping[str, Runs]  # arm -> seed -> rows

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (
  *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
  *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
  *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

_INTERVALS = (
  "95 % intervals: Student's t over runs for a mean, Welch's for a difference. "
  'They cover sampling only; warm start and boards are the same in all runs.'
)


class Mean(NamedTuple):
  """Mean over seeds with its 95 % interval; None with a single seed."""

  value: float
  low: float | None
  high: float | None


def mean_interval(values: Sequence[float]) -> Mean:
  """Mean of some runs, with Student's interval.

      mean -+ t(0.975, n - 1) * s / sqrt(n)

  Source: Student, "The probable error of a mean", Biometrika 6 (1908).
  """
  value, count = statistics.fmean(values), len(values)
  if count == 1:
    return Mean(value, None, None)
  half = _t95(count - 1) * statistics.stdev(values) / math.sqrt(count)
  return Mean(value, value - half, value + half)


def difference_interval(ours: Sequence[float], base: Sequence[float]) -> Mean:
  """Difference of two means of independent runs, with Welch's interval.

      (a + b)^2 / (a^2 / (m - 1) + b^2 / (n - 1)) degrees of freedom,
      with a = s_m^2 / m and b = s_n^2 / n

  Source: Welch, "The generalization of Student's problem", Biometrika 34
  (1947). A difference with a single run on either side has no interval.
  """
  value = statistics.fmean(ours) - statistics.fmean(base)
  if min(len(ours), len(base)) < 2:
    return Mean(value, None, None)
  parts = [(statistics.variance(x) / len(x), len(x) - 1) for x in (ours, base)]
  total = sum(part for part, _ in parts)
  if total == 0:
    return Mean(value, value, value)
  freedom = total**2 / sum(part**2 / free for part, free in parts)
  half = _t95(freedom) * math.sqrt(total)
  return Mean(value, value - half, value + half)


def _t95(freedom: float) -> float:
  """Quantile for the degrees of freedom rounded down, at most 30."""
  return _T95[min(int(freedom + 1e-9), len(_T95)) - 1]


def table(results: Results) -> str:
  """Return the comparison as a Markdown table, the best arm first.

  Arms are ranked by the last evaluation and compared with the first arm of
  `results`. `over training` is the mean of all evaluations after the first,
  `peak minus final` the best minus the last.

  Raises:
    ValueError: no arm has a finished run.
  """
  done = {arm: runs for arm, runs in results.items() if runs}
  if not done:
    raise ValueError('no arm has a finished run yet')
  base = next(iter(results))
  header = (
    *('arm', 'runs', 'success, by seed', 'mean', '95 % interval'),
    *(f'difference to {base}', 'over training', 'peak minus final'),
  )
  ranked = sorted(done, key=lambda arm: -statistics.fmean(_last(done[arm])))
  body = []
  for arm in ranked:
    compared = done.get(base) if arm != base else None
    body.append((arm, *_cells(done[arm], compared)))
  text = summary.markdown([header, *body])
  if any(_is_stalled(rows) for runs in done.values() for rows in runs.values()):
    text += '\n\n* nothing left to learn from at that step'
  return f'{_heading(results)}\n\n{text}\n\n{_INTERVALS}'


def _cells(runs: Runs, base_runs: Runs | None) -> list[str]:
  """Return the cells of one arm, after its name."""
  mean, difference = mean_interval(_last(runs)), '-'
  if base_runs:
    difference = _points(difference_interval(_last(runs), _last(base_runs)))
  curves = [[row['success'] for row in rows] for rows in runs.values()]
  drop = statistics.fmean(max(curve) - curve[-1] for curve in curves)
  # Higher for an arm that learned sooner.
  over_training = statistics.fmean(
    statistics.fmean(curve[1:] or curve) for curve in curves
  )
  return [
    str(len(runs)),
    ', '.join(_final(runs[seed]) for seed in sorted(runs)),
    f'{mean.value:.1%}',
    _bounds(mean),
    difference,
    f'{over_training:.1%}',
    f'{100 * drop:.1f} points',
  ]


def _final(rows: Rows) -> str:
  mark = f' at {rows[-1]["step"]}*' if _is_stalled(rows) else ''
  return f'{rows[-1]["success"]:.1%}{mark}'


def _is_stalled(rows: Rows) -> bool:
  return 'stalled' in rows[-1]


def _heading(results: Results) -> str:
  last = [rows[-1] for runs in results.values() for rows in runs.values()]
  steps = sorted({row['step'] for row in last if 'stalled' not in row})
  episodes = sorted({row['episodes'] for row in last if 'episodes' in row})
  text = f'Held-out success after {" or ".join(map(str, steps))} steps'
  if episodes:
    text += f', {" or ".join(map(str, episodes))} episodes a run'
  return f'{text}:'


def picture(results: Results, *, path: pathlib.Path):
  """Draw a curve per arm with a run: mean over its seeds, and their range."""
  curves = [(arm, _curve(runs)) for arm, runs in results.items() if runs]
  plots.overlay(
    curves,
    random_success=None,
    title='Held-out success; mean and range of the seeds',
    path=path,
  )


def _curve(runs: Runs) -> plots.Rows:
  """Return mean, minimum and maximum success at the steps of all seeds."""
  by_step = [{row['step']: row['success'] for row in r} for r in runs.values()]
  shared = set.intersection(*(set(steps) for steps in by_step))
  rows = []
  for step in sorted(shared):
    values = [steps[step] for steps in by_step]
    rows.append(
      {
        'step': step,
        'success': statistics.fmean(values),
        'success_low': min(values),
        'success_high': max(values),
      }
    )
  return rows


def _last(runs: Runs) -> list[float]:
  return [runs[seed][-1]['success'] for seed in sorted(runs)]


def _bounds(mean: Mean) -> str:
  """Return the interval of a rate, cut off at 0 and 1."""
  if mean.low is None:
    return '-'
  return f'{max(mean.low, 0.0):.1%} to {min(mean.high, 1.0):.1%}'


def _points(mean: Mean) -> str:
  text = f'{100 * mean.value:+.1f} points'
  if mean.low is None:
    return text
  return f'{text} ({100 * mean.low:+.1f} to {100 * mean.high:+.1f})'
