"""Several processes that are one run: how they start, agree and end.

All of them run the same program with the same config. They follow the same
episodes and hold replicated metrics, so nearly everything that steers the loop
is equal by construction; what only one of them knows (a signal, the answer of
an environment, a file) goes through `allgather`. A process that dies ends the
others: JAX's coordination service misses its heartbeat, or a collective fails.
One that is slow (it fetches a model, or plays at random for the chance level)
is waited for as long as it lives.

A single process passes through here without a collective.
"""

import collections
import contextlib
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from actfocus_jax import errors
from actfocus_jax.run import interrupt

# A process that is silent for so long is dead, in seconds.
_HEARTBEAT_TIMEOUT = 30
# In so many seconds all must have come: machines of a cluster may start minutes
# apart. It is told what one waits for after the second number.
_JOIN_WITHIN = 300.0
_TELL_AFTER = 15.0
_FRAME_BYTES = 1024
_LENGTH_BYTES = 4
# Seconds that process 0 stays after an error, which may be that of all: without
# it the others would tell of its loss instead.
_LINGER = 5.0


# --- Starting and ending -----------------------------------------------------


def start(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  local_devices: Sequence[int] | None = None,
):
  """Join the other processes, before JAX looks for devices.

  Args:
    coordinator: HOST:PORT of process 0, with the two below, or all None: then
      the cluster tells (TPU pod, Slurm, Open MPI 4, Kubernetes).
    num_processes: How many there are.
    process_id: Which one this is, from 0.
    local_devices: As of `clusters.local_devices`.

  Raises:
    ValueError: When nothing tells who the others are, or the cluster does not
      answer, in JAX's words. When the others do not come the process ends with
      one sentence: JAX would abort it.
  """
  where = f' at {coordinator}' if coordinator else ''
  come, on_sigterm = threading.Event(), signal.getsignal(signal.SIGTERM)
  threading.Thread(target=_expect, args=(come, where), daemon=True).start()
  try:
    jax.distributed.initialize(
      coordinator_address=coordinator,
      num_processes=num_processes,
      process_id=process_id,
      local_device_ids=local_devices,
      initialization_timeout=int(_JOIN_WITHIN) + 60,
      heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
    )
  except RuntimeError as error:  # As of a service account without rights.
    raise ValueError(str(error)) from error
  finally:
    come.set()
  # JAX took the signal, for a notice that nobody here asks it about.
  signal.signal(signal.SIGTERM, on_sigterm)


def first_barrier():
  """The first exchange of all, right after `start`, inside `exit_on_error`.

  While all are here: it has a time limit (30 s on CPU), and what comes next may
  take one of them longer. Later ones have none.

  Raises:
    UsageError: As of `check_devices`.
  """
  if count() > 1:
    check_devices([device.process_index for device in jax.devices()])
  allgather(None)
  if not is_first():  # One of them talks; all of them may complain.
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115


def check_devices(owners: Sequence[int]):
  """Refuses processes of which one has more devices than another.

  Args:
    owners: The process of each device of all.

  Raises:
    UsageError: One sentence, the same in all processes.
  """
  counts = collections.Counter(owners)
  fewest, most = (pick(counts, key=counts.get) for pick in (min, max))
  if counts[fewest] != counts[most]:
    raise errors.UsageError(
      f'The devices of process {fewest} are {counts[fewest]} and those of '
      f'process {most} are {counts[most]}; allowed: as many in each.'
    )


def _expect(come: threading.Event, where: str):
  """Ends this process unless the others come; a thread of its own."""
  if come.wait(_TELL_AFTER):
    return
  print(
    f'Waiting for the other processes{where}, {_JOIN_WITHIN:g} s at most.',
    file=sys.stderr,
    flush=True,
  )
  if come.wait(_JOIN_WITHIN - _TELL_AFTER):
    return
  print(
    f'error: not all processes came{where} within {_JOIN_WITHIN:g} s. Look at '
    'the output of each: one that was refused or killed says so. If none was, '
    'can all reach process 0, do they agree on how many they are, and has each '
    'a number of its own?',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
  """End this process at once when something is raised inside: see `abort`.

  What commands say and exit with stays the same.
  """
  try:
    yield
  except BaseException as error:
    abort(error)
    raise


def abort(error: BaseException):
  """Says what failed and ends this process at once; returns when it is alone.

  The orderly way out waits for all processes, and they wait for this one in
  the middle of a step, or of a checkpoint that it cannot write.

  Args:
    error: From any thread.
  """
  try:
    is_alone, may_be_first = count() == 1, is_first()
  except (RuntimeError, AssertionError):
    # To find the devices is what failed, which also says who is the first.
    is_alone, may_be_first = False, True
  if is_alone:
    return
  told = errors.sentence(error)
  if told is not None or isinstance(error, _TOLD):
    print(f'error: {told or error}', file=sys.stderr)
  elif is_loss(error):
    print(
      'error: another process has ended, or cannot be reached: its own '
      'output says why. The same command goes on from the last whole '
      f'checkpoint. ({str(error).splitlines()[0][:200]})',
      file=sys.stderr,
    )
  else:
    traceback.print_exception(error)
  for stream in (sys.stdout, sys.stderr):
    stream.flush()
  try:
    is_ours = isinstance(error, Exception) and not is_loss(error)
    if may_be_first and is_ours:
      time.sleep(_LINGER)
  finally:  # Whoever interrupts that has waited enough.
    os._exit(_code(error))


_TOLD = (errors.RunError, interrupt.Stopped)


# What the libraries of collectives say when another process does not answer.
_LOST = re.compile(
  r'Gloo|NCCL|[Cc]onnection (reset|closed|refused)|[Hh]eartbeat|[Cc]oordination'
)


def is_loss(error: BaseException) -> bool:
  """Whether it says that a collective had nobody to talk to."""
  is_jax = isinstance(error, jax.errors.JaxRuntimeError)
  return is_jax and bool(_LOST.search(str(error)))


def _code(error: BaseException) -> int:
  """The exit code that a command would have ended with."""
  if isinstance(error, interrupt.Stopped):
    return error.code
  return 1 if errors.sentence(error) is None else 2


def count() -> int:
  """Number of processes; alone, no device is needed to know it."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
  """Index of this process, from 0."""
  return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
  """Whether this is the one that writes and talks."""
  return index() == 0


# --- Agreeing ----------------------------------------------------------------


def allgather(value: Any) -> list[Any]:
  """What each process has to say, in their order.

  A collective: every process calls it, at the same place of the program.

  Args:
    value: Of this process; picklable.

  Returns:
    One value a process.
  """
  if count() == 1:
    return [value]
  said = pickle.dumps(value)
  said = len(said).to_bytes(_LENGTH_BYTES, 'big') + said
  frames = _gathered(said[:_FRAME_BYTES], _FRAME_BYTES)
  sizes = [int.from_bytes(frame[:_LENGTH_BYTES], 'big') for frame in frames]
  # Few widths, for each is compiled; most have enough of the first.
  width = _FRAME_BYTES
  while width < max(sizes) + _LENGTH_BYTES:
    width *= 2
  if width > _FRAME_BYTES:
    frames = _gathered(said, width)
  return [
    pickle.loads(frame[_LENGTH_BYTES : _LENGTH_BYTES + size])
    for frame, size in zip(frames, sizes, strict=True)
  ]


def _gathered(said: bytes, width: int) -> list[bytes]:
  """What each process says, filled up to the same width."""
  row = np.frombuffer(said.ljust(width, b'\0'), np.uint8)
  return [one.tobytes() for one in multihost_utils.process_allgather(row)]


def first_non_none(value: Any) -> Any:
  """The first value that is not None, in the order of processes; collective."""
  return next((v for v in allgather(value) if v is not None), None)


def broadcast(value: Any) -> Any:
  """What process 0 has; a collective."""
  return allgather(value)[0]


def common(values: Sequence[Any]) -> list[Any]:
  """Those of the first process's values that all have; a collective."""
  first, *others = allgather(list(values))
  return [v for v in first if all(v in other for other in others)]


@contextlib.contextmanager
def raise_everywhere() -> Iterator[None]:
  """What one process refuses inside, all refuse; a collective when it is left.

  There is none inside: a process that refuses would not come to it. Whatever
  else is raised goes through, and ends this process and so the others.

  Raises:
    UsageError: In all processes, with the sentence of the first that refuses.
  """
  refusal = None
  try:
    yield
  except errors.UsageError as error:
    if count() == 1:
      raise
    refusal = error
  told = allgather(None if refusal is None else str(refusal))
  who = next((i for i, said in enumerate(told) if said is not None), None)
  if who is not None:
    prefix = '' if len(set(told)) == 1 else f'process {who}: '
    raise errors.UsageError(prefix + told[who])


def check_equal(value: Any, what: str, allowed: str):
  """Refuses processes that do not have the same value; a collective.

  Args:
    value: Of this process.
    what: Names it in the sentence.
    allowed: What would do.

  Raises:
    UsageError: One sentence.
  """
  values = allgather(value)
  other = next((i for i, v in enumerate(values) if v != values[0]), None)
  if other is not None:
    raise errors.UsageError(
      f'{what} is {values[0]!r} in process 0 and {values[other]!r} in process '
      f'{other}; allowed: {allowed}.'
    )
