"""Flags by which a command becomes one of several processes of a run.

No flag is needed if Slurm, Open MPI 4 or GKE (a TPU slice of several hosts)
started the processes. `--distributed=on` is for TPU VMs and for Kubernetes (an
indexed Job, with the package `kubernetes`). Open MPI 5 needs --coordinator.
Anywhere else --coordinator, --num_processes and --process_id go together.
"""

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

from absl import flags

from actfocus_jax import errors
from actfocus_jax.parallel import processes

_DISTRIBUTED = flags.DEFINE_enum(
  'distributed',
  'auto',
  ['auto', 'on', 'off'],
  'Join the other processes of a cluster: auto reads the environment variables '
  'of Slurm, Open MPI and TPU pods on GKE; on is for TPU VMs and Kubernetes, '
  'which set none.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, without a known cluster.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes; with --coordinator.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Index of this process, from 0; with --coordinator.'
)


def check():
  """Raise UsageError for flags that do not go together."""
  given = _given()
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if len(missing) == 3:
    return
  if missing == ['--coordinator'] and processes.count_and_index():
    raise errors.UsageError(
      'missing: --coordinator; Open MPI 5 numbers its processes, but does not '
      'say where process 0 is; allowed: HOST:PORT of process 0.'
    )
  if missing:
    raise errors.UsageError(
      f'missing: {", ".join(missing)}; --coordinator, --num_processes and '
      '--process_id go together, or none of them.'
    )
  if _DISTRIBUTED.value == 'off':
    raise errors.UsageError(
      '--distributed=off and --coordinator exclude each other.'
    )
  host, _, port = given['coordinator'].rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise errors.UsageError(
      f'--coordinator is {given["coordinator"]!r}; allowed: HOST:PORT with a '
      'port from 1 to 65535.'
    )
  count, index = given['num_processes'], given['process_id']
  if count < 1:
    raise errors.UsageError(f'--num_processes is {count}; allowed: 1 or more.')
  if not 0 <= index < count:
    raise errors.UsageError(
      f'--process_id is {index}; allowed: 0 to {count - 1}, below '
      '--num_processes.'
    )
  if index == 0:
    _check_port(int(port))


def _given() -> dict[str, str | int | None]:
  """Values of the flags; Open MPI 5 fills in those that are left out."""
  count = index = None
  if _DISTRIBUTED.value != 'off':
    count, index = processes.count_and_index() or (None, None)
  values = {
    'coordinator': (_COORDINATOR.value, None),
    'num_processes': (_NUM_PROCESSES.value, count),
    'process_id': (_PROCESS_ID.value, index),
  }
  return {
    name: default if flag is None else flag
    for name, (flag, default) in values.items()
  }


def _check_port(port: int):
  """Refuse a port that is taken on this machine; jax would crash."""
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    socket.create_server(('', port), family=family, dualstack_ipv6=both).close()
  except OSError as error:
    if error.errno == errno.EADDRINUSE:
      raise errors.UsageError(
        f'--coordinator is {_COORDINATOR.value}, whose port is taken on the '
        'machine of process 0; allowed: a free one.'
      ) from error


@contextlib.contextmanager
def joined() -> Iterator[None]:
  """Join the other processes, if there are any; disconnect at the end.

  A failure ends this process at once, and that ends the others. Checks that can
  fail on one machine alone belong inside, in `processes.raise_everywhere`: a
  process that is refused before it joins leaves the others waiting.

  Raises:
    UsageError: the other processes are not known.
  """
  requested = _DISTRIBUTED.value == 'on' or _COORDINATOR.value
  cluster = _DISTRIBUTED.value == 'auto' and processes.cluster_name()
  if not (requested or cluster):
    yield
    return
  try:
    processes.start(**_given(), local_devices=processes.local_devices())
  except ValueError as error:
    reason = ' '.join(str(error).split()).rstrip('.')
    if 'coordinator_address' in reason:
      reason = 'this machine does not belong to a known cluster'
    raise errors.UsageError(
      f'--distributed={_DISTRIBUTED.value}, but {reason}. Allowed: '
      '--distributed=off, or --coordinator with --num_processes and '
      '--process_id.'
    ) from error
  with processes.exit_on_error():
    processes.first_barrier()
    yield


def check_configs(config: dict[str, Any]):
  """Raise UsageError if processes have different configs; names a field."""
  first, *others = processes.allgather(config)
  for i, other in enumerate(others, 1):
    for field in sorted(first.keys() | other.keys()):
      if first.get(field) != other.get(field):
        raise errors.UsageError(
          f'{field} is {first.get(field)!r} in process 0 and '
          f'{other.get(field)!r} in process {i}; all processes need the same '
          'config.'
        )
