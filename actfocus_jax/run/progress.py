"""Display of a running loop.

On a terminal a bar with the latest values stays at the bottom and notes
scroll above it. Elsewhere (a log file, a pipe, Slurm) both are plain lines.
"""

import collections
import math
import sys
import time
from typing import Any

from rich import console as rich_console
from rich import live, progress_bar, table, text

# Number of recent steps whose mean duration gives the time left.
_WINDOW = 20


class Progress:
  """Context that shows how far a loop has come."""

  def __init__(
    self,
    title: str,
    total: int,
    *,
    plain: bool | None = None,
    interval: float = 0.0,
  ):
    """Prepare the display; `with` shows it.

    Args:
      title: word in front of the bar.
      total: number of steps.
      plain: lines instead of a bar; None means yes unless stdout is a terminal.
      interval: minimum number of seconds between two plain lines, for loops of
        many short steps; the first and the last step are always shown.
    """
    self._title = title
    self._total = total
    self._plain = not sys.stdout.isatty() if plain is None else plain
    self._interval = interval
    self._values: dict[str, Any] = {}
    self._step: int | None = None
    self._step_time = 0.0
    self._line_time = -math.inf
    self._spans: collections.deque[tuple[int, float]] = collections.deque(
      maxlen=_WINDOW
    )
    self._live: live.Live | None = None

  def __enter__(self) -> 'Progress':
    """Show the bar."""
    self._start = time.monotonic()
    if not self._plain:
      self._live = live.Live(
        get_renderable=self._render,
        console=rich_console.Console(),
        refresh_per_second=4,
      )
      self._live.start()
    return self

  def __exit__(self, *exception) -> None:
    """Stop updating the bar and leave it on the screen."""
    if self._live is not None:
      self._live.stop()
      self._live = None

  def update(self, step: int, **values: Any) -> None:
    """Show that `step` steps are done, and values under their names.

    The bar keeps the last value of a name that is missing.
    """
    now = time.monotonic()
    if self._step is not None and step > self._step:
      self._spans.append((step - self._step, now - self._step_time))
    self._values |= values
    self._step, self._step_time = step, now
    due = now - self._line_time >= self._interval
    if self._plain and (due or step >= self._total):
      self._line_time = now
      fields = [f'{self._title} {step}/{self._total}']
      fields += [f'{name} {compact(value)}' for name, value in values.items()]
      fields.append(f'left {duration(self.seconds_left())}')
      print('  '.join(fields), flush=True)

  def note(self, message: str) -> None:
    """Show a line that stays: above the bar, or among the plain lines."""
    if self._live is not None:
      # Text, not str: square brackets in a message are not markup.
      self._live.console.print(text.Text(message))
    else:
      print(message, flush=True)

  def seconds_left(self) -> float | None:
    """Return the mean seconds per recent step times the steps left.

    The first step only starts the clock, since it compiles; None before the
    second.
    """
    steps = sum(count for count, _ in self._spans)
    if not steps:
      return None
    mean = sum(seconds for _, seconds in self._spans) / steps
    return mean * max(self._total - self._step, 0)

  def _render(self) -> rich_console.Group:
    step = self._step or 0
    bar = table.Table.grid(padding=(0, 2))
    bar.add_row(
      text.Text(self._title, style='bold'),
      progress_bar.ProgressBar(total=self._total, completed=step, width=32),
      text.Text(f'{step}/{self._total}'),
      text.Text(f'{duration(time.monotonic() - self._start)} gone', 'dim'),
      text.Text(f'{duration(self.seconds_left())} left', 'dim'),
    )
    values = text.Text()
    for name, value in self._values.items():
      values.append(f'{name} ', 'dim').append(f'{compact(value)}   ', 'bold')
    return rich_console.Group(bar, values)


def compact(value: Any) -> str:
  """Format a value in few characters: 1,234,567 / 12.3 / 0.00123 / 1.2e-05."""
  if value is None:
    return '-'
  if isinstance(value, (bool, str)):
    return str(value)
  number = float(value)
  size = abs(number)
  if not math.isfinite(number):
    return str(number)
  if size >= 1000 or number.is_integer():
    return f'{number:,.0f}'
  return f'{number:.3g}' if size >= 1e-3 else f'{number:.1e}'


def duration(seconds: float | None) -> str:
  """Format seconds as 42s, 3m07s or 5h02m; '-' for None."""
  if seconds is None:
    return '-'
  whole = round(seconds)
  if whole < 60:
    return f'{whole}s'
  if whole < 3600:
    return f'{whole // 60}m{whole % 60:02d}s'
  return f'{whole // 3600}h{whole % 3600 // 60:02d}m'
