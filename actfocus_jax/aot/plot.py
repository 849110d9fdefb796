"""The picture of `scale`: speed, cost, and where the time of a step goes."""

import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib import figure, ticker

from actfocus_jax.aot import scale as scales

_COLORS = ('#c44e52', '#4c72b0', '#55a868')
_MARKS = ('s', 'o', '^')
_PARTS = ('rollout', 'score', 'update', 'host')
_PART_COLORS = ('#4c72b0', '#8172b3', '#dd8452', '#937860')


def scale(
  points: Sequence[dict[str, Any]], path: pathlib.Path, title: str, assumed: str
):
  """Draws three panels.

  Args:
    points: From `scale.run`.
    path: Of the PNG.
    title: Whose curves these are.
    assumed: A paragraph, for the foot.
  """
  drawn = figure.Figure(figsize=(15, 5.6), layout='constrained')
  speed, cost, time = drawn.subplots(1, 3)
  _speed(speed, points)
  _cost(cost, points)
  _time(time, points)
  drawn.suptitle(
    f'{title}: bounds from programs compiled for chips that were not there; of '
    'these times only the host was measured',
    fontsize=11,
  )
  # A dollar sign would begin a formula.
  foot = textwrap.fill(assumed, 235).replace('$', r'\$')
  drawn.supxlabel(foot, fontsize=7, x=0.01, ha='left', color='#555555')
  path.parent.mkdir(parents=True, exist_ok=True)
  drawn.savefig(path, dpi=120)


def _lines(points) -> dict[str, list[dict[str, Any]]]:
  found: dict[str, list[dict[str, Any]]] = {}
  for one in points:
    if 'seconds' in one:
      found.setdefault(one['line'], []).append(one)
  return found


def _speed(axes, points):
  for i, (name, own) in enumerate(_lines(points).items()):
    x = [one['chips'] for one in own]
    y = [one['tokens_per_second'] for one in own]
    share = scales.efficiency(points, name)[x[-1]]
    label = f'{name}: at {x[-1]:,} {share:.0%} of dotted'
    axes.plot(x, y, color=_COLORS[i], marker=_MARKS[i], label=label)
    ideal = [y[0] * count / x[0] for count in x]
    axes.plot(x, ideal, color=_COLORS[i], linestyle=':', linewidth=1)
  axes.set_title('sampled tokens a second, at most (dotted: in proportion)')
  _chips_axis(axes, points)
  axes.set_yscale('log')
  axes.margins(y=0.2)
  axes.legend(fontsize=8, loc='upper left')


def _cost(axes, points):
  for i, (name, own) in enumerate(_lines(points).items()):
    x = [one['chips'] for one in own]
    y = [one['dollars_per_million'] for one in own]
    axes.plot(x, y, color=_COLORS[i], marker=_MARKS[i], label=name)
    last = own[-1]
    axes.annotate(
      f'${last["dollars"]:.2f} an iteration',
      (x[-1], y[-1]),
      textcoords='offset points',
      xytext=(-4, -36 if i == 2 else 8),  # Clear of the lines.
      ha='right',
      fontsize=8,
      color=_COLORS[i],
    )
  axes.set_title('dollars a million sampled tokens, at least')
  _chips_axis(axes, points)
  axes.set_yscale('log')
  axes.margins(y=0.1)
  axes.yaxis.set_major_formatter(ticker.FormatStrFormatter('$%.2f'))
  axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _time(axes, points):
  own = [one for one in points if 'seconds' in one]
  base = [0.0] * len(own)
  for part, color in zip(_PARTS, _PART_COLORS, strict=True):
    values = [one['seconds'][part] for one in own]
    axes.bar(range(len(own)), values, bottom=base, color=color, label=part)
    base = [b + value for b, value in zip(base, values, strict=True)]
  names = [
    f'{one["chips"]:,} {one["kind"]}{"" if "grows" in one["line"] else "*"}'
    for one in own
  ]
  axes.set_xticks(range(len(own)), names, rotation=60, ha='right', fontsize=8)
  axes.set_title("seconds of an iteration (*: the paper's batch)")
  axes.grid(axis='y', alpha=0.3)
  axes.legend(fontsize=8)


def _chips_axis(axes, points):
  axes.set_xscale('log', base=2)
  axes.set_xlabel('chips')
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f'{x:,.0f}'))
  axes.grid(alpha=0.3)
