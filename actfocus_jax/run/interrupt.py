"""Ctrl-C and SIGTERM request a stop; the loop decides when."""

import os
import signal
import threading
from types import FrameType

from actfocus_jax.parallel import processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
  """Context that turns SIGINT and SIGTERM into a flag.

  The loop reads the flag between two steps, saves and leaves. A second SIGINT
  raises KeyboardInterrupt at once. Handlers can be set in the main thread only;
  in any other thread the context does nothing. Contexts may be nested.

  Attributes:
    requested: true if a signal has come.
    signal: name of the first one, such as 'SIGTERM'; None before.
  """

  def __init__(self):
    self.requested = False
    self.signal: str | None = None
    self._sigints = 0
    self._before = {}

  @property
  def code(self) -> int:
    """Exit code as in shells: 130 for SIGINT, 143 for SIGTERM, else 0.

    Not 0, although all is saved: what restarts jobs (a Kubernetes Job, a loop
    in a batch script) takes 0 for finished work.
    """
    return 128 + signal.Signals[self.signal] if self.signal else 0

  def agreed(self) -> str | None:
    """Return the signal that any process of the run received; a collective."""
    name = processes.first_non_none(self.signal)
    if name:
      self.requested, self.signal = True, self.signal or name
    return name

  def __enter__(self) -> 'Interrupt':
    """Set the handlers."""
    if threading.current_thread() is threading.main_thread():
      for number in _SIGNALS:
        self._before[number] = signal.signal(number, self._handle)
        outer = getattr(self._before[number], '__self__', None)
        if isinstance(outer, Interrupt) and outer.requested:
          self.requested, self.signal = True, outer.signal
    return self

  def __exit__(self, *exception) -> None:
    """Put the handlers back; pass the signal on to an outer context."""
    for number, handler in self._before.items():
      # None: not set from Python, so it cannot be put back from here.
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
