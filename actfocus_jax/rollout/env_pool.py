"""Calls to environments, which may be slow, raise or hang.

A call that raises or takes too long fails alone; the other calls of its batch
return their results. Every exception becomes a `Failed`, SystemExit included.
The only exception is KeyboardInterrupt in the caller's own thread. Python
cannot end a thread, so one that hangs is abandoned and replaced.
"""

import dataclasses
import queue
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any

from actfocus_jax.parallel import processes

_POLL = 0.01  # seconds between two checks of the time limit


@dataclasses.dataclass(frozen=True)
class Failed:
  """A failed call: one line of text, and a traceback unless it was too slow."""

  reason: str
  details: str = ''


class EnvPool:
  """Runs batches of calls, in the caller's thread or in its own threads.

  A context manager; `seconds` is the wall time of all batches so far.
  """

  def __init__(self, threads: int = 0, time_limit: float | None = None):
    """Create the pool; threads start with the first batch.

    Args:
      threads: number of calls that run at a time; 0 runs them one after the
        other in the caller's thread.
      time_limit: seconds that one call may take; None for no limit.

    Raises:
      ValueError: if a number is out of range, or there is a limit without
        threads, which could not be enforced.
    """
    if threads < 0 or (time_limit is not None and time_limit <= 0):
      raise ValueError(
        f'threads is {threads} and time_limit is {time_limit}; allowed: 0 or '
        'more, and None or above 0.'
      )
    if time_limit is not None and not threads:
      raise ValueError(
        f'time_limit is {time_limit}, but threads is 0; allowed: None, or 1 '
        'thread or more.'
      )
    self.seconds = 0.0
    self._threads, self._time_limit = threads, time_limit
    self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
    self._workers: list[threading.Thread] = []

  def __enter__(self) -> 'EnvPool':
    """Return the pool."""
    return self

  def __exit__(self, *exception):
    """Close the pool."""
    self.close()

  def run(self, calls: Sequence[Callable[[], Any]]) -> list[Any | Failed]:
    """Run pure calls; return the result of each in order, or `Failed`.

    Several run at once, and a failed one is not repeated.
    """
    begin = time.perf_counter()
    if self._threads:
      while len(self._workers) < min(self._threads, len(calls)):
        self._start_thread()
      jobs = [_Job(call) for call in calls]
      for job in jobs:
        self._jobs.put(job)
      outcomes = [self._wait(job) for job in jobs]
    else:
      outcomes = [_attempt(call, KeyboardInterrupt) for call in calls]
    self.seconds += time.perf_counter() - begin
    return outcomes

  def run_and_share(
    self,
    calls: Sequence[Callable[[], tuple[Any, Any]]],
    owners: Sequence[Collection[int]],
  ) -> list[tuple[Any, Any] | Failed]:
    """Run the calls of this process and share the results; a collective.

    Args:
      calls: the same in all processes. Each returns a pair: the first half
        stays with the owners, the second half is sent to all processes.
      owners: processes that run each call.

    Returns:
      The pair of each call in order, or `Failed`; (None, second half) for a
      call that other processes ran.
    """
    if processes.count() == 1:
      return self.run(calls)
    if not calls:
      return []
    me = processes.index()
    mine = [i for i, owner in enumerate(owners) if me in owner]
    own = dict(zip(mine, self.run([calls[i] for i in mine]), strict=True))
    shared = processes.allgather(
      {i: out if isinstance(out, Failed) else out[1] for i, out in own.items()}
    )
    outcomes = []
    for i in range(len(calls)):
      results = [received[i] for received in shared if i in received]
      failed = next((r for r in results if isinstance(r, Failed)), None)
      state = own[i][0] if i in own and not failed else None
      outcomes.append(failed or (state, results[0]))
    return outcomes

  def _wait(self, job: '_Job') -> Any | Failed:
    if self._time_limit is None:
      job.done.wait()
      return job.outcome
    # The time in the queue does not count.
    while not job.done.wait(_POLL):
      late = job.begin and time.monotonic() - job.begin > self._time_limit
      if late and job.abandon():
        self._workers.remove(job.worker)
        self._start_thread()
        return Failed(f'took longer than {self._time_limit:g} s')
    return job.outcome

  def _start_thread(self):
    worker = threading.Thread(
      target=_work, args=(self._jobs,), daemon=True, name='environment'
    )
    self._workers.append(worker)
    worker.start()

  def close(self):
    """End the idle threads; calls that hang end with the process."""
    for _ in self._workers:
      self._jobs.put(None)
    self._workers.clear()


class _Job:
  """One call that waits for, runs in, or has left a thread."""

  def __init__(self, call: Callable[[], Any]):
    self.call = call
    self.begin: float | None = None
    self.worker: threading.Thread | None = None
    self.outcome: Any = None
    self.done = threading.Event()
    self.is_abandoned = False
    self._lock = threading.Lock()

  def finish(self, outcome) -> bool:
    """Store the outcome; return False if the call was abandoned."""
    with self._lock:
      if not self.is_abandoned:
        self.outcome = outcome
        self.done.set()
      return not self.is_abandoned

  def abandon(self) -> bool:
    """Abandon the call; return False if it has finished meanwhile."""
    with self._lock:
      self.is_abandoned = not self.done.is_set()
      return self.is_abandoned


def _work(jobs):
  while (job := jobs.get()) is not None:
    # Set before `begin`: once `begin` is set, `_wait` may read the thread.
    job.worker = threading.current_thread()
    job.begin = time.monotonic()
    if not job.finish(_attempt(job.call)):
      return  # Another thread has replaced this one.


def _attempt(
  call: Callable[[], Any], passes: type[BaseException] | tuple[()] = ()
) -> Any | Failed:
  try:
    return call()
  except passes:
    raise
  except BaseException as error:  # Environments may raise anything.
    return Failed(_reason(error), _printable(traceback.format_exc()))


def _reason(error: BaseException) -> str:
  try:
    text = str(error)
  except Exception:  # An exception may fail to print, too.
    text = '(without a readable message)'
  return _printable(f'{type(error).__name__}: {text}'.splitlines()[0])


def _printable(text: str) -> str:
  """Escape lone surrogates, which terminals and files refuse."""
  return text.encode('utf-8', 'backslashreplace').decode('utf-8')
