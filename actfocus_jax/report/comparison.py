"""Several arms, several seeds: one table, honest about its spread.

The unit is a run: its last held-out success. Episodes within a run say how well
that policy does; only runs say how well the method does. Intervals are those of
Student's t over seeds, those of differences Welch's: a seed moves what is
sampled and nothing else, so runs of one seed have little in common. All runs
share one warm start and one set of boards, whose luck no interval contains.
"""

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from actfocus_jax.report import plots, summary

# arm -> seed -> rows of eval.jsonl, the first from before training.
Results = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (
  *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
  *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
  *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


_INTERVALS = (
  "Intervals, 95 %: Student's t over runs, of differences Welch's. They hold "
  'the luck of sampling; warm start and boards are the same in all runs.'
)


class Mean(NamedTuple):
  """A mean over seeds with its 95 % interval; None where one seed is all."""

  value: float
  low: float | None
  high: float | None


def mean_interval(values: Sequence[float]) -> Mean:
  """The mean of some runs, with Student's interval.

      mean -+ t(0.975, n - 1) * s / sqrt(n)

  Source: Student, "The probable error of a mean", Biometrika 6 (1908).

  Args:
    values: one for each seed, at least one.

  Returns:
    The mean and its interval.

  Raises:
    ValueError: there are no values.
  """
  if not values:
    raise ValueError('no values to take the mean of')
  value, count = statistics.fmean(values), len(values)
  if count == 1:
    return Mean(value, None, None)
  half = _t95(count - 1) * statistics.stdev(values) / math.sqrt(count)
  return Mean(value, value - half, value + half)


def difference_interval(ours: Sequence[float], base: Sequence[float]) -> Mean:
  """The difference of two means of independent runs, with Welch's interval.

      (a + b)^2 / (a^2 / (m - 1) + b^2 / (n - 1)) degrees of freedom,
      with a = s_m^2 / m and b = s_n^2 / n

  Source: Welch, "The generalization of Student's problem", Biometrika 34
  (1947).

  Args:
    ours: one for each seed, at least one.
    base: likewise.

  Returns:
    The difference; without an interval where either has a single run.
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
  """Of the next lower whole number of degrees of freedom, at most 30."""
  return _T95[min(int(freedom + 1e-9), len(_T95)) - 1]


def table(results: Results) -> str:
  """The comparison as a Markdown table, the best arm first.

  The ranking is by the last evaluation. `over training` is the mean of all
  evaluations after the first, `peak minus final` what an arm lost again.

  Args:
    results: the first arm is what others are compared with. Seeds that an arm
      has not finished are left out.

  Returns:
    Lines of Markdown.

  Raises:
    ValueError: no arm has a finished run.
  """
  done = {
    arm: {seed: [row['success'] for row in rows] for seed, rows in runs.items()}
    for arm, runs in results.items()
    if runs
  }
  if not done:
    raise ValueError('no arm has a finished run yet')
  marks = {
    arm: {
      seed: f' at {rows[-1]["step"]}*' if 'stalled' in rows[-1] else ''
      for seed, rows in runs.items()
    }
    for arm, runs in results.items()
  }
  base = next(iter(results))
  rows = [
    (
      *('arm', 'runs', 'success, by seed', 'mean', '95 % interval'),
      *(f'difference to {base}', 'over training', 'peak minus final'),
    )
  ]
  ranked = sorted(done, key=lambda arm: -mean_interval(_last(done[arm])).value)
  for arm in ranked:
    runs = done[arm]
    mean = mean_interval(_last(runs))
    difference = '-'
    if arm != base and base in done:
      difference = _points(difference_interval(_last(runs), _last(done[base])))
    drop = statistics.fmean(max(run) - run[-1] for run in runs.values())
    along = mean_interval([_over_training(run) for run in runs.values()])
    rows.append(
      (
        arm,
        str(len(runs)),
        ', '.join(f'{runs[s][-1]:.1%}{marks[arm][s]}' for s in sorted(runs)),
        f'{mean.value:.1%}',
        _bounds(mean),
        difference,
        f'{along.value:.1%}',
        f'{100 * drop:.1f} points',
      )
    )
  text = summary.markdown(rows)
  if any(any(of_arm.values()) for of_arm in marks.values()):
    text += '\n\n* nothing left to learn from at that step'
  return f'{_heading(results)}\n\n{text}\n\n{_INTERVALS}'


def _heading(results: Results) -> str:
  """What the numbers are: of which step, of how many episodes."""
  last = [rows[-1] for runs in results.values() for rows in runs.values()]
  steps = sorted({row['step'] for row in last if 'stalled' not in row})
  episodes = sorted({row['episodes'] for row in last if 'episodes' in row})
  text = f'Held-out success after {" or ".join(map(str, steps))} steps'
  if episodes:
    text += f', {" or ".join(map(str, episodes))} episodes a run'
  return f'{text}:'


def picture(results: Results, *, path: str | pathlib.Path):
  """Draws a curve per arm: the mean over its seeds, and their range.

  Args:
    results: as for `table`; an arm without a finished run is left out.
    path: the PNG to write.
  """
  curves = [(arm, _curve(runs)) for arm, runs in results.items() if runs]
  plots.overlay(
    curves,
    random_success=None,
    title='Held-out success; mean of the seeds, least to greatest',
    path=path,
  )


def _curve(runs: Mapping[int, Sequence[Mapping[str, Any]]]) -> plots.Rows:
  """Mean, least and greatest success at the steps that all seeds have."""
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


def _last(runs: Mapping[int, Sequence[float]]) -> list[float]:
  return [runs[seed][-1] for seed in sorted(runs)]


def _over_training(run: Sequence[float]) -> float:
  """The mean of the evaluations after the first: who learned sooner."""
  return statistics.fmean(run[1:] or run)


def _bounds(mean: Mean) -> str:
  """The interval of a rate; what Student puts beyond 0 and 1 is cut off."""
  if mean.low is None:
    return '-'
  return f'{max(mean.low, 0.0):.1%} to {min(mean.high, 1.0):.1%}'


def _points(mean: Mean) -> str:
  text = f'{100 * mean.value:+.1f} points'
  if mean.low is None:
    return text
  return f'{text} ({100 * mean.low:+.1f} to {100 * mean.high:+.1f})'
