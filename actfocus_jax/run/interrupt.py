"""Ctrl-C and SIGTERM ask a run to stop; the loop decides when."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
  """A signal ended a command before its work was done.

  Attributes:
    code: the exit code.
  """

  def __init__(self, message: str, code: int):
    """Says what was stopped; the code is that of `Interrupt`."""
    super().__init__(message)
    self.code = code


class Interrupt:
  """Turns SIGINT and SIGTERM into a flag while the context is open.

  The loop looks at `requested` between two steps, saves and leaves. A second
  SIGINT raises KeyboardInterrupt at once. Handlers can be set in the main
  thread only; in any other the context does nothing. Each process sees its own
  signals: on several hosts the loop must agree on the flag before it acts.
  Contexts may stand inside each other.

  Attributes:
    requested: whether a signal has come.
    signal: the name of the first one, such as 'SIGTERM'; None before.
  """

  def __init__(self):
    self.requested = False
    self.signal: str | None = None
    self._sigints = 0
    self._before = {}

  @property
  def code(self) -> int:
    """The exit code as shells have it: 130 of SIGINT, 143 of SIGTERM, else 0.

    Not 0, though all is saved: what starts jobs anew (a Kubernetes Job, a loop
    in a batch script) takes 0 for finished work.
    """
    return 128 + signal.Signals[self.signal] if self.signal else 0

  def agreed(self, first_non_none: Callable[[str | None], str | None]):
    """The signal that any process of the run has had, or None.

    Args:
      first_non_none: Tells all processes what one of them says; a collective.
    """
    name = first_non_none(self.signal)
    if name:
      self.requested, self.signal = True, self.signal or name
    return name

  def __enter__(self) -> 'Interrupt':
    """Sets the handlers."""
    if threading.current_thread() is threading.main_thread():
      for number in _SIGNALS:
        self._before[number] = signal.signal(number, self._handle)
        outer = getattr(self._before[number], '__self__', None)
        if isinstance(outer, Interrupt) and outer.requested:
          self.requested, self.signal = True, outer.signal
    return self

  def __exit__(self, *exception) -> None:
    """Puts the handlers back; who waits outside of this one is told too."""
    for number, handler in self._before.items():
      # None: it was not set from Python, and cannot be put back from here.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
      outer = getattr(handler, '__self__', None)
      if self.requested and isinstance(outer, Interrupt):
        outer.requested, outer.signal = True, self.signal
    self._before.clear()

  def _handle(self, number: int, frame: FrameType | None) -> None:
    self._sigints += number == signal.SIGINT
    if self._sigints > 1:
      raise KeyboardInterrupt
    if self.requested:
      return
    self.requested = True
    self.signal = signal.Signals(number).name
    # os.write, since print may be what the signal interrupted.
    os.write(
      2, f'\n{self.signal}: stopping after this step or evaluation\n'.encode()
    )
