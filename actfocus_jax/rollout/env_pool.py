"""Environments are other people's code: they may be slow, raise, or hang.

With several processes each runs the environments of its own rows, and tells the
others what they said. A call that raises or takes too long is lost alone; the
others of its batch come back whole. Raises whatever it may, SystemExit too:
only KeyboardInterrupt in the caller's own thread, which is the user's, goes
through. Python cannot end a thread, so one that hangs is left behind, idle as
far as this module is concerned, and another one takes its place.
"""

import dataclasses
import queue
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any

from actfocus_jax.parallel import processes

_POLL = 0.01  # seconds between two looks at the clock of running calls


@dataclasses.dataclass(frozen=True)
class Failed:
  """A call that gave nothing.

  Attributes:
    reason: One line.
    details: The traceback, or '' of a call that took too long.
  """

  reason: str
  details: str = ''


class EnvPool:
  """Runs batches of calls, in this thread or in threads of its own.

  A context manager: leaving it lets the threads end, as `close` does.

  Attributes:
    seconds: How long all batches took so far.
  """

  def __init__(self, threads: int = 0, time_limit: float | None = None):
    """Starts nothing before the first batch.

    Args:
      threads: How many calls run at a time; 0 runs one after the other in the
        caller's thread.
      time_limit: Seconds that one call may take; None for any.

    Raises:
      ValueError: A limit without threads, which nobody could keep, or a number
        out of range.
    """
    if threads < 0 or (time_limit is not None and time_limit <= 0):
      raise ValueError(
        f'threads is {threads} and time_limit {time_limit}; allowed: 0 or '
        'more, and None or above 0'
      )
    if time_limit is not None and not threads:
      raise ValueError(f'time_limit is {time_limit} without threads')
    self.seconds = 0.0
    self._threads, self._time_limit = threads, time_limit
    self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
    self._workers: list[threading.Thread] = []

  def __enter__(self) -> 'EnvPool':
    """Returns itself."""
    return self

  def __exit__(self, *exception):
    """Closes it."""
    self.close()

  def run(self, calls: Sequence[Callable[[], Any]]) -> list[Any | Failed]:
    """Runs every call, here.

    Args:
      calls: Without arguments; pure, for several run at once and none of them
        is tried again.

    Returns:
      What each returned, in their order, or `Failed`.
    """
    begin = time.perf_counter()
    if self._threads:
      outcomes = self._run_in_threads(calls)
    else:
      outcomes = [_attempt(call, KeyboardInterrupt) for call in calls]
    self.seconds += time.perf_counter() - begin
    return outcomes

  def run_and_share(
    self,
    calls: Sequence[Callable[[], tuple[Any, Any]]],
    owners: Sequence[Collection[int]],
  ) -> list[tuple[Any, Any] | Failed]:
    """Runs this process's own calls, and tells the others; a collective.

    Args:
      calls: As of `run`, the same in all processes; each returns a pair, whose
        first half stays with the owners and whose second half all are told.
      owners: Which processes run each of them.

    Returns:
      The pair of each, in their order, or `Failed`; (None, second half) of one
      that others ran.
    """
    if processes.count() == 1:
      return self.run(calls)
    if not calls:
      return []
    me = processes.index()
    mine = [i for i, owner in enumerate(owners) if me in owner]
    own = dict(zip(mine, self.run([calls[i] for i in mine]), strict=True))
    told = processes.allgather(
      {i: out if isinstance(out, Failed) else out[1] for i, out in own.items()}
    )
    outcomes = []
    for i in range(len(calls)):
      words = [words[i] for words in told if i in words]
      failed = next((w for w in words if isinstance(w, Failed)), None)
      state = own[i][0] if i in own and not failed else None
      outcomes.append(failed or (state, words[0]))
    return outcomes

  def _run_in_threads(self, calls):
    while len(self._workers) < min(self._threads, len(calls)):
      self._hire()
    jobs = [_Job(call) for call in calls]
    for job in jobs:
      self._jobs.put(job)
    return [self._wait(job) for job in jobs]

  def _wait(self, job: '_Job') -> Any | Failed:
    if self._time_limit is None:
      job.done.wait()
      return job.outcome
    # A call's clock starts when a thread takes it, not while it queues.
    while not job.done.wait(_POLL):
      late = job.begin and time.monotonic() - job.begin > self._time_limit
      if late and job.abandon():
        self._workers.remove(job.worker)
        self._hire()
        return Failed(f'took longer than {self._time_limit:g} s')
    return job.outcome

  def _hire(self):
    worker = threading.Thread(
      target=_work, args=(self._jobs,), daemon=True, name='environment'
    )
    self._workers.append(worker)
    worker.start()

  def close(self):
    """Lets idle threads end; calls that hang end with the process."""
    for _ in self._workers:
      self._jobs.put(None)
    self._workers.clear()


class _Job:
  """One call on its way through a thread."""

  def __init__(self, call: Callable[[], Any]):
    self.call = call
    self.begin: float | None = None
    self.worker: threading.Thread | None = None
    self.outcome: Any = None
    self.done = threading.Event()
    self.is_abandoned = False
    self._lock = threading.Lock()

  def finish(self, outcome) -> bool:
    """Notes the outcome unless nobody waits for it any more."""
    with self._lock:
      if not self.is_abandoned:
        self.outcome = outcome
        self.done.set()
      return not self.is_abandoned

  def abandon(self) -> bool:
    """Stops waiting, unless it finished in the meantime."""
    with self._lock:
      self.is_abandoned = not self.done.is_set()
      return self.is_abandoned


def _work(jobs):
  while (job := jobs.get()) is not None:
    # The thread before the clock: whoever sees the clock run needs the thread.
    job.worker = threading.current_thread()
    job.begin = time.monotonic()
    if not job.finish(_attempt(job.call)):
      return  # Its place has been taken.


def _attempt(
  call: Callable[[], Any], passes: type[BaseException] | tuple[()] = ()
) -> Any | Failed:
  try:
    return call()
  except passes:
    raise
  except BaseException as error:  # Whatever another's code may raise.
    return Failed(_reason(error), _printable(traceback.format_exc()))


def _reason(error: BaseException) -> str:
  try:
    text = str(error)
  except Exception:  # That is another's code, too.
    text = '(without a readable message)'
  return _printable(f'{type(error).__name__}: {text}'.splitlines()[0])


def _printable(text: str) -> str:
  """Without lone surrogates, which no terminal and no file takes."""
  return text.encode('utf-8', 'backslashreplace').decode('utf-8')
