"""The flags by which a command becomes one of several processes of a run.

Nothing is needed where Slurm, Open MPI 4 or GKE (a TPU slice of several hosts)
started them; `--distributed=on` asks the machine itself (TPU VMs) or Kubernetes
(an indexed Job, with the package `kubernetes`); Open MPI 5 says all but
--coordinator; elsewhere --coordinator, --num_processes and --process_id say it.
"""

import contextlib
import errno
import socket
from collections.abc import Iterator

import ml_collections
from absl import flags

from actfocus_jax import errors
from actfocus_jax.config import schema
from actfocus_jax.parallel import clusters

_DISTRIBUTED = flags.DEFINE_enum(
  'distributed',
  'auto',
  ['auto', 'on', 'off'],
  'Whether this is one of several processes that the cluster knows of: auto '
  'looks at the environment variables of Slurm, Open MPI and TPU pods on GKE; '
  'on is for TPU VMs and Kubernetes, which have none that say so.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, where no cluster tells.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes there are; with --coordinator.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is, from 0; with --coordinator.'
)


def check():
  """Refuses flags that do not go together, before the slow imports.

  Raises:
    UsageError: One sentence.
  """
  given = _given()
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if len(missing) == 3:
    return
  if missing == ['--coordinator'] and clusters.count_and_index():
    raise errors.UsageError(
      'missing: --coordinator; Open MPI 5 tells its processes who they are, '
      'but not where process 0 is; allowed: HOST:PORT of process 0.'
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
  """What the flags say, and Open MPI 5 where they are left out."""
  count = index = None
  if _DISTRIBUTED.value != 'off':
    count, index = clusters.count_and_index() or (None, None)
  told = {
    'coordinator': (_COORDINATOR.value, None),
    'num_processes': (_NUM_PROCESSES.value, count),
    'process_id': (_PROCESS_ID.value, index),
  }
  return {
    name: default if flag is None else flag
    for name, (flag, default) in told.items()
  }


def _check_port(port: int):
  """Refuses one that is taken on this machine: jax would crash."""
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
  """Joins the other processes, if there are any, and leaves with them.

  A failure ends this process at once, and that ends the others. What can be
  refused on one machine alone is looked at inside, in `raise_everywhere`: the
  others would wait for a process that is refused before it joins.

  Raises:
    UsageError: When nothing tells who the others are.
  """
  if not _is_one_of_several():
    yield
    return
  from actfocus_jax.parallel import processes

  try:
    processes.start(**_given(), local_devices=clusters.local_devices())
  except ValueError as error:
    told = ' '.join(str(error).split()).rstrip('.')
    if 'coordinator_address' in told:
      told = 'this machine tells of no cluster'
    raise errors.UsageError(
      f'--distributed={_DISTRIBUTED.value}, but {told}. Allowed: '
      '--distributed=off, or --coordinator with --num_processes and '
      '--process_id.'
    ) from error
  with processes.exit_on_error():
    processes.first_barrier()
    yield


@contextlib.contextmanager
def raise_everywhere() -> Iterator[None]:
  """What one process refuses inside all refuse; alone it needs no jax.

  Raises:
    UsageError: One sentence, in every process.
  """
  if not _is_one_of_several():
    yield
    return
  from actfocus_jax.parallel import processes

  with processes.raise_everywhere():
    yield


def check_configs(c: ml_collections.ConfigDict):
  """Refuses processes that were started with different configs.

  Args:
    c: The config of this process.

  Raises:
    UsageError: One sentence that names a field.
  """
  if not _is_one_of_several():
    return
  from actfocus_jax.parallel import processes

  configs = processes.allgather(schema.to_json(c))
  for i, other in enumerate(configs):
    first = configs[0]
    fields = sorted(first.keys() | other.keys())
    field = next((f for f in fields if first.get(f) != other.get(f)), None)
    if field is not None:
      raise errors.UsageError(
        f'{field} is {first.get(field)!r} in process 0 and '
        f'{other.get(field)!r} in process {i}; all processes need the same '
        'config.'
      )


def _is_one_of_several() -> bool:
  told = _DISTRIBUTED.value == 'on' or _COORDINATOR.value
  looks = _DISTRIBUTED.value == 'auto'
  return bool(told or (looks and clusters.several()))
