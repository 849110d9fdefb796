"""Plots of a run: PNG, 1800 pixels wide, legible at half of that.

Colours are from the Okabe-Ito set, which is safe for the common kinds of colour
blindness. Lines are labelled at their ends instead of in a legend.
"""

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import figure, ticker
from matplotlib.axes import Axes
from matplotlib.backends import backend_agg

from actfocus_jax.report import rows as rows_lib

Rows = list[dict[str, Any]]

_BLUE, _ORANGE, _GREEN = '#0072B2', '#D55E00', '#009E73'
_PURPLE, _SKY, _YELLOW = '#CC79A7', '#56B4E9', '#E69F00'
_RUN_COLORS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _YELLOW, _SKY)
_INK, _FAINT = '#333333', '#8A8A8A'
_DPI = 200
_WIDTH = 9.0
_TITLE = 'Success; held out with 95 % interval'


def learning_curve(
  eval_rows: Rows,
  metrics_rows: Rows,
  *,
  random_success: float | None,
  warm_start_success: float | None = None,
  path: pathlib.Path,
) -> None:
  """Draw one run: success above, token weights and signal below.

  A lower panel is left out if no row has its values. Baselines may be None.
  """
  mass = rows_lib.column(metrics_rows, 'weights/action_mass')[0]
  signal = rows_lib.column(metrics_rows, 'signal/mean')[0]
  lower = [draw for draw, has in ((_weight, mass), (_signal, signal)) if has]
  picture = figure.Figure(
    figsize=(_WIDTH, 6.4 if lower else 4.2), layout='constrained'
  )
  if lower:
    grid = picture.add_gridspec(
      2, len(lower), height_ratios=(2.1, 1), hspace=0.08
    )
    axes = picture.add_subplot(grid[0, :])
    for column, draw in enumerate(lower):
      draw(picture.add_subplot(grid[1, column]), metrics_rows)
  else:
    axes = picture.add_subplot()
  ends = [_held_out(axes, eval_rows, 'held out', _BLUE)]
  ends.append(_training(axes, metrics_rows))
  _finish(axes, ends, random_success, warm_start_success)
  _write(picture, path)


def overlay(
  runs: Sequence[tuple[str, Rows]],
  *,
  random_success: float | None,
  title: str = _TITLE,
  path: pathlib.Path,
) -> None:
  """Draw the held-out success of several runs into one picture.

  `runs` has a label and rows of eval.jsonl per run; colours repeat after six.
  """
  picture = figure.Figure(figsize=(_WIDTH, 4.6), layout='constrained')
  axes = picture.add_subplot()
  ends = [
    _held_out(axes, rows, label, _RUN_COLORS[i % len(_RUN_COLORS)])
    for i, (label, rows) in enumerate(runs)
  ]
  _finish(axes, ends, random_success, None, title)
  _write(picture, path)


def smooth(values: Sequence[float], window: int) -> np.ndarray:
  """Return the mean of the last `window` values at each index."""
  total = np.concatenate([[0.0], np.cumsum(values)])
  stop = np.arange(1, len(values) + 1)
  start = np.maximum(stop - window, 0)
  return (total[stop] - total[start]) / (stop - start)


def _held_out(axes: Axes, rows: Rows, label: str, color: str):
  """Draw success with its band; return the label and its position."""
  steps, success = rows_lib.column(rows, 'success')
  if not steps:
    return None
  axes.plot(steps, success, color=color, lw=2, marker='o', ms=4, zorder=4)
  low_steps, low = rows_lib.column(rows, 'success_low')
  _, high = rows_lib.column(rows, 'success_high')
  if low_steps == steps and len(high) == len(low):
    axes.fill_between(steps, low, high, color=color, alpha=0.16, lw=0)
  return success[-1], f'{label} {success[-1]:.0%}', color


def _training(axes: Axes, rows: Rows):
  """Draw the training success as a thin running mean."""
  steps, success = rows_lib.column(rows, 'train/success')
  if not steps:
    return None
  mean = smooth(success, window=max(1, len(success) // 20))
  axes.plot(steps, mean, color=_ORANGE, lw=1, zorder=3)
  return mean[-1], f'training {mean[-1]:.0%}', _ORANGE


def _finish(
  axes: Axes, ends, random_success, warm_start_success, title=_TITLE
) -> None:
  """Add the baselines, the labels and the scales."""
  ends = [end for end in ends if end is not None]
  levels = [
    ('random play', random_success, (0, (1, 2))),
    ('warm start', warm_start_success, (0, (5, 3))),
  ]
  for name, level, dashes in levels:
    if level is not None:
      axes.axhline(level, color=_FAINT, lw=1.2, ls=dashes, zorder=2)
      ends.append((level, f'{name} {level:.0%}', _FAINT))
  axes.set_title(title, loc='left', color=_INK, fontsize=13)
  top = max([axes.dataLim.y1, *(end[0] for end in ends), 0.1])
  axes.set_ylim(0, min(1.02, 1.08 * top))
  axes.yaxis.set_major_formatter(ticker.PercentFormatter(xmax=1, decimals=0))
  _plain(axes)
  _label_ends(axes, ends)


def _weight(axes: Axes, rows: Rows) -> None:
  """Draw the share of action tokens, and their share of the weight."""
  axes.set_title('Share of action tokens', loc='left', color=_INK, fontsize=11)
  ends = []
  for key, name, color in (
    ('weights/action_share', 'in count', _FAINT),
    ('weights/action_mass', 'in weight', _BLUE),
  ):
    steps, values = rows_lib.column(rows, key)
    if steps:
      axes.plot(steps, values, color=color, lw=1.5)
      ends.append((values[-1], f'{name} {values[-1]:.0%}', color))
  axes.set_ylim(0, 1.1 * max([axes.dataLim.y1, 0.05]))
  axes.yaxis.set_major_formatter(ticker.PercentFormatter(xmax=1, decimals=0))
  _plain(axes)
  _label_ends(axes, ends)


def _signal(axes: Axes, rows: Rows) -> None:
  """Draw the mean signal over action tokens, plus and minus one deviation."""
  axes.set_title('Signal on action tokens', loc='left', color=_INK, fontsize=11)
  steps, mean = (np.array(x) for x in rows_lib.column(rows, 'signal/mean'))
  axes.plot(steps, mean, color=_GREEN, lw=1.5)
  std_steps, std = (np.array(x) for x in rows_lib.column(rows, 'signal/std'))
  if len(std_steps) == len(steps):
    axes.fill_between(
      steps, mean - std, mean + std, color=_GREEN, alpha=0.16, lw=0
    )
  _plain(axes)
  _label_ends(axes, [(mean[-1], f'mean {mean[-1]:.3g}\n± 1 std', _GREEN)])


def _plain(axes: Axes) -> None:
  """Remove spines and ticks that carry no number."""
  axes.spines[['top', 'right']].set_visible(False)
  axes.spines[['left', 'bottom']].set_color(_FAINT)
  axes.tick_params(colors=_INK, labelsize=10, color=_FAINT)
  axes.grid(axis='y', color='#E4E4E4', lw=0.8, zorder=0)
  axes.set_axisbelow(True)
  axes.set_xlabel('step', color=_INK, fontsize=10)
  axes.xaxis.set_major_locator(
    ticker.MaxNLocator(nbins=8, steps=(1, 2, 5, 10), integer=True)
  )
  axes.margins(x=0.01)


def _label_ends(axes: Axes, ends) -> None:
  """Write (y, text, colour) labels right of the axes, without overlap."""
  bottom, top = axes.get_ylim()
  position = axes.get_subplotspec().get_position(axes.figure)
  # Height of a label of 10.5 points, as a share of the axes.
  inches = position.height * axes.figure.get_figheight()
  heights = [0.2 * (1 + text.count('\n')) / inches for _, text, _ in ends]
  wanted = [(y - bottom) / (top - bottom) for y, _, _ in ends]
  centers = spread(wanted, heights)
  for center, (_, label, color) in zip(centers, ends, strict=True):
    axes.text(
      1.012,
      center,
      label,
      color=color,
      transform=axes.transAxes,
      va='center',
      fontsize=10.5,
    )


def spread(wanted: Sequence[float], heights: Sequence[float]) -> np.ndarray:
  """Return centres of labels, near the wanted ones, so that none overlap.

  Labels that touch form a block, centred on the mean of its members' wanted
  centres.
  """
  blocks: list[list[int]] = []
  for index in np.argsort(wanted, kind='stable'):
    blocks.append([int(index)])
    while len(blocks) > 1 and (
      _edges(blocks[-1], wanted, heights)[0]
      < _edges(blocks[-2], wanted, heights)[1]
    ):
      blocks[-2:] = [blocks[-2] + blocks[-1]]
  centers = np.zeros(len(wanted))
  for block in blocks:
    edge = _edges(block, wanted, heights)[0]
    for index in block:
      centers[index] = edge + heights[index] / 2
      edge += heights[index]
  return centers


def _edges(block, wanted, heights) -> tuple[float, float]:
  center = float(np.mean([wanted[index] for index in block]))
  half = sum(heights[index] for index in block) / 2
  return center - half, center + half


def _write(picture: figure.Figure, path: pathlib.Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  png = io.BytesIO()
  backend_agg.FigureCanvasAgg(picture).print_figure(png, dpi=_DPI)
  path.write_bytes(png.getvalue())
