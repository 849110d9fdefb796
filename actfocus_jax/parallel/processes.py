"""Processes of one run: how they start, agree and end.

All of them run the same program with the same config. They play the same
episodes and hold replicated metrics, so nearly everything that steers the loop
is equal by construction. A value that only one process has (a signal, the
result of an environment, a file) goes through `allgather`.

A process that dies ends the others: JAX's coordination service misses its
heartbeat, or a collective fails.
The others wait for a slow process as long as it lives.

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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from actfocus_jax import errors

# Seconds without a heartbeat after which a process counts as dead.
_HEARTBEAT_TIMEOUT = 30
# Seconds within which all processes must join: machines of a cluster may start
# minutes apart. After _REPORT_AFTER seconds a message names what this process
# waits for.
_JOIN_WITHIN = 300.0
_REPORT_AFTER = 15.0
_FRAME_BYTES = 1024
_LENGTH_BYTES = 4
# Seconds that process 0 stays after an error. The others may have the same one;
# without the delay they would report the loss of process 0 instead.
_LINGER = 5.0
# Errors of the collective libraries when another process does not answer.
_LOST = re.compile(
  r'Gloo|NCCL|[Cc]onnection (reset|closed|refused)|[Hh]eartbeat|[Cc]oordination'
)


# --- Clusters ----------------------------------------------------------------

# It sets the number and the index of a process, but unlike earlier versions not
# the address of process 0, so jax does not know it.
OPEN_MPI_5 = 'Open MPI 5'


def cluster_name(environ: Mapping[str, str] = os.environ) -> str | None:
  """Return the cluster that started this process as one of several, or None.

  It reads only variables that a cluster sets for processes that it starts
  together. Someone who logs into a machine of a pod has none of them. A pod of
  an indexed Kubernetes Job may or may not be one of several; it needs a flag.
  """
  counts = {
    'Open MPI': ('OMPI_MCA_orte_hnp_uri', 'OMPI_COMM_WORLD_SIZE'),
    OPEN_MPI_5: ('PMIX_NAMESPACE', 'OMPI_COMM_WORLD_SIZE'),
    'Slurm': ('SLURM_STEP_NODELIST', _slurm_count(environ)),
  }
  for name, (mark, count) in counts.items():
    if mark in environ and int(environ.get(count, '1')) > 1:
      return name
  if ',' in environ.get('TPU_WORKER_HOSTNAMES', ''):
    return 'a TPU pod'
  if int(environ.get('MEGASCALE_NUM_SLICES', '1')) > 1:
    return 'several TPU slices'
  return None


def _slurm_count(environ: Mapping[str, str]) -> str:
  """Return the name of the variable with the process count of a Slurm step.

  The shell of an interactive allocation is a step of one process, in which
  SLURM_NTASKS counts the processes of the allocation.
  """
  step = 'SLURM_STEP_NUM_TASKS'
  return step if step in environ else 'SLURM_NTASKS'


def count_and_index(
  environ: Mapping[str, str] = os.environ,
) -> tuple[int, int] | None:
  """Number of processes that Open MPI 5 started, and this one's index."""
  if cluster_name(environ) != OPEN_MPI_5:
    return None
  return (
    int(environ['OMPI_COMM_WORLD_SIZE']),
    int(environ['OMPI_COMM_WORLD_RANK']),
  )


def local_devices(environ: Mapping[str, str] = os.environ) -> list[int] | None:
  """Return the devices of this machine that `jax.distributed` should take.

  It is [], all of them, if Slurm or Open MPI started one process per machine:
  jax would take only the first. None leaves the choice to jax and its
  variables: one device per process on these clusters, elsewhere all.
  """
  if 'JAX_LOCAL_DEVICE_IDS' in environ:
    return None
  if 'OMPI_COMM_WORLD_LOCAL_SIZE' in environ:
    if environ['OMPI_COMM_WORLD_LOCAL_SIZE'] == '1':
      return []
    is_known_to_jax = cluster_name(environ) != OPEN_MPI_5
    rank = environ.get('OMPI_COMM_WORLD_LOCAL_RANK')
    return None if is_known_to_jax else [int(rank)]
  nodes = environ.get('SLURM_STEP_NUM_NODES')
  is_alone = nodes and nodes == environ.get(_slurm_count(environ))
  return [] if is_alone else None


# --- Starting ----------------------------------------------------------------


def start(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  local_devices: Sequence[int] | None = None,
):
  """Join the other processes, before JAX looks for devices.

  If they do not come, the process ends with one sentence; JAX would abort it.

  Without coordinator (HOST:PORT of process 0), number and index, jax reads them
  from the cluster (TPU pod, Slurm, Open MPI 4, Kubernetes).

  Raises:
    ValueError: the other processes are not known, or the cluster does not
      answer; the message is that of JAX.
  """
  address = f' at {coordinator}' if coordinator else ''
  joined, on_sigterm = threading.Event(), signal.getsignal(signal.SIGTERM)
  threading.Thread(
    target=_exit_unless, args=(joined, address), daemon=True
  ).start()
  try:
    jax.distributed.initialize(
      coordinator_address=coordinator,
      num_processes=num_processes,
      process_id=process_id,
      local_device_ids=local_devices,
      initialization_timeout=int(_JOIN_WITHIN) + 60,
      heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
    )
  except RuntimeError as error:  # Such as a service account without rights.
    raise ValueError(str(error)) from error
  finally:
    joined.set()
  # JAX has replaced the handler by one for preemption notices, unused here.
  signal.signal(signal.SIGTERM, on_sigterm)


def _exit_unless(joined: threading.Event, address: str):
  """End this process if the others do not come; runs in its own thread."""
  if joined.wait(_REPORT_AFTER):
    return
  print(
    f'Waiting for the other processes{address}, {_JOIN_WITHIN:g} s at most.',
    file=sys.stderr,
    flush=True,
  )
  if joined.wait(_JOIN_WITHIN - _REPORT_AFTER):
    return
  print(
    f'error: not all processes came{address} within {_JOIN_WITHIN:g} s. Look '
    'at the output of each for an error. If there is none, check that all can '
    'reach process 0, agree on their number, and have different indices.',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def first_barrier():
  """Run the first collective, right after `start`, inside `exit_on_error`.

  On CPU the first collective has a time limit of 30 s; later ones have none. So
  it runs here, before anything that may take one process longer.

  Raises:
    UsageError: processes have different numbers of devices.
  """
  if count() > 1:
    check_devices([device.process_index for device in jax.devices()])
  allgather(None)
  if not is_first():  # Only process 0 writes to stdout; all write to stderr.
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115


def check_devices(owners: Sequence[int]):
  """Raise UsageError if the processes own different numbers of devices."""
  counts = collections.Counter(owners)
  fewest, most = (pick(counts, key=counts.get) for pick in (min, max))
  if counts[fewest] != counts[most]:
    raise errors.UsageError(
      f'Process {fewest} has {counts[fewest]} devices and process {most} has '
      f'{counts[most]}; allowed: the same number in each.'
    )


def count() -> int:
  """Number of processes; a single one needs no device to know it."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
  """Index of this process, from 0."""
  return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
  """Return whether this process writes the files and stdout."""
  return index() == 0


# --- Ending ------------------------------------------------------------------


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
  """End this process at once if anything is raised inside: see `abort`.

  Messages and exit codes of the commands stay the same.
  """
  try:
    yield
  except BaseException as error:
    abort(error)
    raise


def abort(error: BaseException):
  """Print the error and end this process; return if it is the only one.

  An orderly exit would wait for all processes, while they wait for this one in
  the middle of a step, or of a checkpoint that it cannot write.
  """
  try:
    is_alone, may_be_first = count() == 1, is_first()
  except (RuntimeError, AssertionError):
    # No device was found, and the index comes from the devices.
    is_alone, may_be_first = False, True
  if is_alone:
    return
  sentence = errors.sentence(error)
  if isinstance(error, (errors.RunError, errors.Stopped)):
    sentence = str(error)
  if sentence is not None:
    print(f'error: {sentence}', file=sys.stderr)
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
    is_own = isinstance(error, Exception) and not is_loss(error)
    if may_be_first and is_own:
      time.sleep(_LINGER)
  finally:  # Also if a signal interrupts the sleep.
    code = 1 if errors.sentence(error) is None else 2
    os._exit(error.code if isinstance(error, errors.Stopped) else code)


def is_loss(error: BaseException) -> bool:
  """Return whether a collective failed because another process was lost."""
  is_jax = isinstance(error, jax.errors.JaxRuntimeError)
  return is_jax and bool(_LOST.search(str(error)))


# --- Agreeing ----------------------------------------------------------------


def allgather(value: Any) -> list[Any]:
  """Return the value of each process, in their order.

  A collective: every process calls it at the same place of the program, with a
  value that can be pickled.
  """
  if count() == 1:
    return [value]
  pickled = pickle.dumps(value)
  message = len(pickled).to_bytes(_LENGTH_BYTES, 'big') + pickled
  frames = _gather(message[:_FRAME_BYTES], _FRAME_BYTES)
  sizes = [int.from_bytes(frame[:_LENGTH_BYTES], 'big') for frame in frames]
  # Few widths, since each is compiled; the first is enough for most messages.
  width = _FRAME_BYTES
  while width < max(sizes) + _LENGTH_BYTES:
    width *= 2
  if width > _FRAME_BYTES:
    frames = _gather(message, width)
  return [
    pickle.loads(frame[_LENGTH_BYTES : _LENGTH_BYTES + size])
    for frame, size in zip(frames, sizes, strict=True)
  ]


def _gather(message: bytes, width: int) -> list[bytes]:
  """Return the messages of all processes, padded to one width."""
  row = np.frombuffer(message.ljust(width, b'\0'), np.uint8)
  return [frame.tobytes() for frame in multihost_utils.process_allgather(row)]


def first_non_none(value: Any) -> Any:
  """Return the first value that is not None, by process; a collective."""
  return next((v for v in allgather(value) if v is not None), None)


def broadcast(value: Any) -> Any:
  """Return the value of process 0; a collective."""
  return allgather(value)[0]


def common(values: Sequence[Any]) -> list[Any]:
  """Return the values of process 0 that all others have; a collective."""
  first, *others = allgather(list(values))
  return [v for v in first if all(v in other for other in others)]


@contextlib.contextmanager
def raise_everywhere() -> Iterator[None]:
  """Raise the UsageError of one process in all; a collective at its end.

  No collective is allowed inside: a process that refuses would not reach it.
  Any other error passes through, and ends this process and so the others.

  Raises:
    UsageError: raised in all processes, with the message of the first one.
  """
  refusal = None
  try:
    yield
  except errors.UsageError as error:
    if count() == 1:
      raise
    refusal = str(error)
  refusals = allgather(refusal)
  first = next((i for i, text in enumerate(refusals) if text is not None), None)
  if first is not None:
    prefix = '' if len(set(refusals)) == 1 else f'process {first}: '
    raise errors.UsageError(prefix + refusals[first])


def check_equal(value: Any, what: str, allowed: str):
  """Raise UsageError if the processes have different values; a collective.

  `what` names the value and `allowed` the remedy, for the message.
  """
  values = allgather(value)
  other = next((i for i, v in enumerate(values) if v != values[0]), None)
  if other is not None:
    raise errors.UsageError(
      f'{what} is {values[0]!r} in process 0 and {values[other]!r} in process '
      f'{other}; allowed: {allowed}.'
    )
