"""Several processes that are one run: how they start, agree and end.

All of them run the same program with the same config. They follow the same
episodes and hold replicated metrics, so nearly everything that steers the loop
is equal by construction; what only one of them knows (a signal, the answer of
an environment, a file) goes through `exchange`. A process that dies ends the
others: JAX's coordination service misses its heartbeat, or a collective fails.

A single process passes through here without a collective.
"""

import contextlib
import os
import pickle
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from actfocus_jax.run import interrupt, refusals

# A process that is silent for so long is dead, in seconds.
_HEARTBEAT_TIMEOUT = 30
_FRAME_BYTES = 1024
_LENGTH_BYTES = 4
# Seconds that process 0 stays when all processes end with the same sentence:
# the others cannot end in order without it.
_LINGER = 5.0


# --- Starting and ending -----------------------------------------------------


def several(environ: Mapping[str, str] = os.environ) -> str | None:
  """What says that this process is one of several, or None.

  Only what a cluster sets for the processes that it starts together is looked
  at; a machine of a pod that is logged into is not one of them. A pod of an
  indexed Kubernetes Job may or may not be, so it has to be told.

  Args:
    environ: Of this process.

  Returns:
    The name of the cluster, for people.
  """
  tasks = {
    'Slurm': ('SLURM_STEP_NODELIST', 'SLURM_NTASKS'),
    'Open MPI': ('OMPI_MCA_orte_hnp_uri', 'OMPI_COMM_WORLD_SIZE'),
    'Open MPI 5': ('PMIX_NAMESPACE', 'OMPI_COMM_WORLD_SIZE'),
  }
  for name, (mark, count) in tasks.items():
    if mark in environ and int(environ.get(count, '1')) > 1:
      return name
  if ',' in environ.get('TPU_WORKER_HOSTNAMES', ''):
    return 'a TPU pod'
  if int(environ.get('MEGASCALE_NUM_SLICES', '1')) > 1:
    return 'several TPU slices'
  return None


def start(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
):
  """Joins the other processes. Before anything asks JAX for a device.

  Args:
    coordinator: HOST:PORT of process 0, with the two below, or all None: then
      the cluster tells (TPU pod, Slurm, Open MPI, Kubernetes).
    num_processes: How many there are.
    process_id: Which one this is, from 0.

  Raises:
    RuntimeError: When the others do not come, from JAX.
    ValueError: When nothing tells who the others are, from JAX.
  """
  jax.distributed.initialize(
    coordinator_address=coordinator,
    num_processes=num_processes,
    process_id=process_id,
    heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
  )
  if not is_first():  # One of them talks; all of them may complain.
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115


@contextlib.contextmanager
def leaving() -> Iterator[None]:
  """What is raised inside ends this process at once, when there are several.

  The orderly way out waits for all processes, and they wait for this one in
  the middle of a step. What commands say and exit with stays the same.
  """
  try:
    yield
  except BaseException as error:
    if count() == 1:
      raise
    if isinstance(error, _TOLD):
      print(f'error: {error}', file=sys.stderr)
    else:
      traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    if isinstance(error, _TOLD) and is_first():
      time.sleep(_LINGER)
    os._exit(_code(error))


_TOLD = (refusals.Refused, refusals.Halted, interrupt.Stopped)


def _code(error: BaseException) -> int:
  """The exit code that a command would have ended with."""
  if isinstance(error, interrupt.Stopped):
    return error.code
  return 2 if isinstance(error, refusals.Refused) else 1


def count() -> int:
  """How many processes there are."""
  return jax.process_count()


def index() -> int:
  """Which of them this is."""
  return jax.process_index()


def is_first() -> bool:
  """Whether this is the one that writes and talks."""
  return index() == 0


# --- Agreeing ----------------------------------------------------------------


def exchange(value: Any) -> list[Any]:
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


def first_said(value: Any) -> Any:
  """The first value that is not None, in the order of processes; collective."""
  return next((v for v in exchange(value) if v is not None), None)


def of_first(value: Any) -> Any:
  """What process 0 has; a collective."""
  return exchange(value)[0]


def check_equal(value: Any, what: str, allowed: str):
  """Refuses processes that do not have the same value; a collective.

  Args:
    value: Of this process.
    what: Names it in the sentence.
    allowed: What would do.

  Raises:
    Refused: One sentence.
  """
  values = exchange(value)
  other = next((i for i, v in enumerate(values) if v != values[0]), None)
  if other is not None:
    raise refusals.Refused(
      f'{what} is {values[0]!r} in process 0 and {values[other]!r} in process '
      f'{other}; allowed: {allowed}.'
    )
