"""What a process knows of the others; collectives are tested by whole runs."""

import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from actfocus_jax import errors
from actfocus_jax.parallel import clusters, processes
from actfocus_jax.rollout import env_pool

SLURM = {'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_NTASKS': '2'}
OPEN_MPI_4 = {'OMPI_MCA_orte_hnp_uri': '1', 'OMPI_COMM_WORLD_SIZE': '4'}
OPEN_MPI_5 = {
  'PMIX_NAMESPACE': 'prterun-n1-123@1',
  'OMPI_COMM_WORLD_SIZE': '4',
  'OMPI_COMM_WORLD_RANK': '3',
  'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
  'OMPI_COMM_WORLD_LOCAL_RANK': '1',
}
ONE_EACH = {'OMPI_COMM_WORLD_LOCAL_SIZE': '1'}


@pytest.mark.parametrize(
  ('environ', 'found'),
  [
    ({}, None),
    (SLURM, 'Slurm'),
    (SLURM | {'SLURM_NTASKS': '1'}, None),
    ({'SLURM_NTASKS': '2'}, None),  # In the allocation, but not by srun.
    (SLURM | {'SLURM_STEP_NUM_TASKS': '1'}, None),  # The shell of salloc.
    (SLURM | {'SLURM_NTASKS': '1', 'SLURM_STEP_NUM_TASKS': '2'}, 'Slurm'),
    (OPEN_MPI_4, 'Open MPI'),
    (OPEN_MPI_5, 'Open MPI 5'),
    (OPEN_MPI_5 | SLURM, 'Open MPI 5'),  # Its daemons are steps of Slurm's.
    (OPEN_MPI_5 | {'OMPI_COMM_WORLD_SIZE': '1'}, None),
    (SLURM | {'PMIX_NAMESPACE': 'slurm.pmix'}, 'Slurm'),
    ({'TPU_WORKER_HOSTNAMES': 'a'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 'a TPU pod'),
    ({'MEGASCALE_NUM_SLICES': '1'}, None),
    ({'MEGASCALE_NUM_SLICES': '2'}, 'several TPU slices'),
    ({'KUBERNETES_SERVICE_HOST': 'h'}, None),
    # One of a sweep, as far as anybody can tell.
    ({'KUBERNETES_SERVICE_HOST': 'h', 'JOB_COMPLETION_INDEX': '0'}, None),
  ],
)
def test_a_cluster_is_known_by_what_it_sets(environ, found):
  assert clusters.several(environ) == found


def test_open_mpi_5_says_who_is_who():
  assert clusters.count_and_index(OPEN_MPI_5) == (4, 3)
  for told_to_jax in ({}, SLURM, OPEN_MPI_4):
    assert clusters.count_and_index(told_to_jax) is None


@pytest.mark.parametrize(
  ('environ', 'devices'),
  [
    ({}, None),
    (SLURM | {'SLURM_STEP_NUM_NODES': '2'}, []),
    (SLURM | {'SLURM_STEP_NUM_NODES': '1'}, None),
    (SLURM | {'SLURM_STEP_NUM_NODES': '2', 'SLURM_STEP_NUM_TASKS': '4'}, None),
    (SLURM | {'SLURM_STEP_NUM_NODES': '1', 'SLURM_STEP_NUM_TASKS': '1'}, []),
    (OPEN_MPI_4 | {'OMPI_COMM_WORLD_LOCAL_SIZE': '2'}, None),
    (OPEN_MPI_4 | ONE_EACH, []),
    (OPEN_MPI_5, [1]),
    (OPEN_MPI_5 | ONE_EACH, []),
    (OPEN_MPI_5 | SLURM | {'SLURM_STEP_NUM_NODES': '2'}, [1]),
    (OPEN_MPI_5 | ONE_EACH | {'JAX_LOCAL_DEVICE_IDS': '2'}, None),
  ],
)
def test_who_is_alone_on_a_machine_takes_all_its_devices(environ, devices):
  assert clusters.local_devices(environ) == devices


def test_all_devices_means_all_to_jax():
  """Where it would take the second, as the second process of the machine."""
  code, said = alone("""
from jax._src import xla_bridge
os.environ |= {
  'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': 'localhost',
  'SLURM_NTASKS': '1', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '1',
}
start(1, 0, local_devices=[])
print(xla_bridge.CUDA_VISIBLE_DEVICES.value, file=sys.stderr)
""")
  assert code == 0 and said.splitlines()[-1] == 'all'


def test_what_the_cluster_answers_is_told_in_a_sentence():
  code, said = alone("""
import jax
from actfocus_jax import errors
from actfocus_jax.cli import cluster
def initialize(**arguments):
  raise RuntimeError('Retry failed:\\n  403 Forbidden.')
jax.distributed.initialize = initialize
cluster.flags.FLAGS(['x', '--distributed=on'])
try:
  with cluster.joined():
    pass
except errors.UsageError as error:
  print(error, file=sys.stderr)
""")
  assert code == 0
  assert said.startswith(
    '--distributed=on, but Retry failed: 403 Forbidden. Allowed: '
  )


@pytest.mark.parametrize(
  'count', ['return 2', 'raise RuntimeError("Unable to initialize backend")']
)
def test_who_is_lost_at_the_first_meeting_is_told_in_a_sentence(count):
  code, said = alone(f"""
import jax
from actfocus_jax.cli import cluster
def count():
  {count}
def exchange(value):
  processes.count = count
  raise jax.errors.JaxRuntimeError('Gloo: closed')
processes.allgather = exchange
processes.start = lambda **arguments: None
cluster.flags.FLAGS(['x', '--distributed=on'])
with cluster.joined():
  pass
""")
  assert code == 1
  assert said.startswith('error: another process has ended, or cannot be rea')
  assert said.endswith('(Gloo: closed)\n') and 'Traceback' not in said


def test_one_process_exchanges_with_itself():
  assert (processes.count(), processes.index()) == (1, 0)
  assert processes.is_first()
  assert processes.allgather({'a': 1}) == [{'a': 1}]
  assert processes.first_non_none(None) is None
  assert processes.first_non_none('SIGTERM') == 'SIGTERM'
  assert processes.broadcast(7) == 7
  processes.check_equal(1, 'x', 'y')


@pytest.mark.parametrize('length', [3, 1010, 1018, 1019, 1020, 5000, 70_000])
def test_words_of_any_length_arrive(monkeypatch, length):
  """The frame holds what is short; both edges of it by one byte each."""
  widths = []

  def gathered(row):
    widths.append(row.size)
    return np.stack([row, row])

  monkeypatch.setattr(processes, 'count', lambda: 2)
  monkeypatch.setattr(processes.multihost_utils, 'process_allgather', gathered)
  value = bytes(range(256)) * (length // 256) + bytes(length % 256)
  assert processes.allgather(value) == [value, value]
  assert widths[0] == 1024 and len(widths) == 1 + (length > 1000)


def said_by(monkeypatch, *values):
  monkeypatch.setattr(processes, 'allgather', lambda value: list(values))


def test_processes_that_differ_are_told_apart(monkeypatch):
  said_by(monkeypatch, 'a', 'a', 'b')
  told = "'a' in process 0 and 'b' in process 2; allowed: one."
  with pytest.raises(errors.UsageError, match=told):
    processes.check_equal('a', 'the model', 'one')


def test_the_first_who_says_something_is_heard(monkeypatch):
  said_by(monkeypatch, None, 'SIGTERM', 'SIGINT')
  assert processes.first_non_none(None) == 'SIGTERM'


def as_process(monkeypatch, index, others_said):
  """Makes this process one of two; the other one's words are given."""
  monkeypatch.setattr(processes, 'count', lambda: 2)
  monkeypatch.setattr(processes, 'index', lambda: index)

  def exchange(value):
    said = [others_said, others_said]
    said[index] = value
    return said

  monkeypatch.setattr(processes, 'allgather', exchange)


def test_a_process_runs_its_own_calls_and_is_told_of_the_others(monkeypatch):
  as_process(monkeypatch, 1, {0: 'far', 2: env_pool.Failed('far away')})
  ran = []

  def call(i):
    return lambda: ran.append(i) or (f'state {i}', f'text {i}')

  calls = [call(i) for i in range(4)]
  owners = [{0}, {1}, {0}, {0, 1}]
  # What both own is told by both; the state is this process's own.
  outcomes = env_pool.EnvPool().run_and_share(calls, owners)
  assert ran == [1, 3]
  assert outcomes == [
    (None, 'far'),
    ('state 1', 'text 1'),
    env_pool.Failed('far away'),
    ('state 3', 'text 3'),
  ]


def test_a_call_fails_everywhere_where_it_failed_anywhere(monkeypatch):
  as_process(monkeypatch, 1, {0: env_pool.Failed('over there')})
  outcomes = env_pool.EnvPool().run_and_share(
    [lambda: ('state', 'text')], [{0, 1}]
  )
  assert outcomes == [env_pool.Failed('over there')]


def test_failure_ends_the_process_at_once(tmp_path):
  code = """
import atexit, os, time
from actfocus_jax.parallel import processes
from actfocus_jax import errors
from jax.errors import JaxRuntimeError
processes.count = lambda: 2
processes.index = lambda: {index}
time.sleep = lambda seconds: print(f'stays {seconds:g} s', flush=True)
atexit.register(lambda: print('waited for the others'))
with processes.exit_on_error():
  raise {error}
"""
  # The first stays for the others, who may say the same; not where one is lost.
  for index, error, exit_code, said, stays in (
    (0, "errors.UsageError('no')", 2, 'error: no\n', 'stays 5 s\n'),
    (1, "errors.RunError('bad')", 1, 'error: bad\n', ''),
    (1, "RuntimeError('Unable to initialize backend')", 2, 'nothing.\n', ''),
    (0, "FloatingPointError('x')", 1, 'FloatingPointError: x\n', 'stays 5 s\n'),
    (0, "JaxRuntimeError('Gloo: closed')", 1, '(Gloo: closed)\n', ''),
    (0, 'KeyboardInterrupt', 1, 'KeyboardInterrupt\n', ''),
  ):
    done = subprocess.run(
      [
        sys.executable,
        '-c',
        code.replace('{error}', error).replace('{index}', str(index)),
      ],
      capture_output=True,
      text=True,
      env={**os.environ, 'PYTHONPATH': os.getcwd(), 'JAX_PLATFORMS': 'cpu'},
      timeout=60,
    )
    assert done.returncode == exit_code
    assert done.stderr.endswith(said)
    assert done.stdout == stays


def test_who_finds_no_device_says_so_and_stays_for_the_others():
  """It cannot know that it is not the first of them."""
  code, said = alone("""
import jax
from actfocus_jax.cli import cluster
os.environ['JAX_PLATFORMS'] = 'cuda'
jax.config.update('jax_platforms', 'cuda')
time.sleep = lambda seconds: print(f'stays {seconds:g} s', file=sys.stderr)
processes.start = lambda **arguments: None
cluster.flags.FLAGS(['x', '--distributed=on'])
with cluster.joined():
  pass
""")
  assert code == 2
  assert said.startswith(
    "error: JAX_PLATFORMS is 'cuda', for which jax finds no"
  )
  assert said.endswith('stays 5 s\n')


@pytest.mark.parametrize(
  ('error', 'is_it'),
  [
    (jax.errors.JaxRuntimeError('UNKNOWN: Gloo AllGather failed: ...'), True),
    (jax.errors.JaxRuntimeError('Connection reset by peer'), True),
    (jax.errors.JaxRuntimeError('[CoordinationServiceError=]'), True),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory'), False),
    (OSError('Connection reset by peer'), False),
  ],
)
def test_the_loss_of_another_process_is_known(error, is_it):
  assert processes.is_loss(error) is is_it


def test_all_have_as_many_devices():
  """Else jax could not gather what each has to say."""
  processes.check_devices([0, 0, 1, 1])
  with pytest.raises(
    errors.UsageError, match='of process 0 are 2 and those of process 1 are 3; '
  ):
    processes.check_devices([0, 0, 1, 1, 1])


def test_one_process_raises_as_ever():
  with pytest.raises(errors.UsageError), processes.exit_on_error():
    raise errors.UsageError('no')


def test_one_process_refuses_as_ever():
  told = pytest.raises(errors.UsageError, match='^no$')
  with told, processes.raise_everywhere():
    raise errors.UsageError('no')


@pytest.mark.parametrize(
  ('own', 'others', 'told'),
  [
    ('no', 'no', 'no'),
    ('no', None, 'process 0: no'),
    (None, 'never', 'process 1: never'),
    ('no', 'never', 'process 0: no'),
  ],
)
def test_what_one_refuses_all_refuse(monkeypatch, own, others, told):
  as_process(monkeypatch, 0, others)
  refused = pytest.raises(errors.UsageError, match=f'^{told}$')
  with refused, processes.raise_everywhere():
    if own:
      raise errors.UsageError(own)


def test_where_nobody_refuses_all_go_on(monkeypatch):
  as_process(monkeypatch, 0, None)
  with processes.raise_everywhere():
    pass
  # A failure is not talked about: the others end with this process.
  monkeypatch.setattr(
    processes, 'allgather', lambda value: pytest.fail('talks')
  )
  with pytest.raises(OSError, match='disk'), processes.raise_everywhere():
    raise OSError('disk')


def test_what_all_have_is_what_the_first_has_of_it(monkeypatch):
  said_by(monkeypatch, [1, 2, 3], [3, 2], [2, 3, 4])
  assert processes.common([1, 2, 3]) == [2, 3]


def alone(code):
  """What a process says that starts with others or without, and its code."""
  with socket.socket() as made:
    made.bind(('localhost', 0))
    port = made.getsockname()[1]
  begin = f"""
import os, signal, sys, time
from actfocus_jax.parallel import processes
processes._JOIN_WITHIN, processes._TELL_AFTER = 2.0, 1.0
def start(count, index, **more):
  who = dict(num_processes=count, process_id=index)
  processes.start(coordinator='localhost:{port}', **who, **more)
"""
  done = subprocess.run(
    [sys.executable, '-c', begin + code],
    capture_output=True,
    text=True,
    env={**os.environ, 'PYTHONPATH': os.getcwd()},
    timeout=60,
  )
  return done.returncode, done.stderr


@pytest.mark.parametrize('index', [0, 1])
def test_who_waits_for_nobody_says_so_and_ends(index):
  code, said = alone(f'start(2, {index})')
  assert code == 1
  first, last = said.strip().splitlines()[-2:]
  assert first.startswith('Waiting for the other processes at localhost:')
  assert first.endswith(', 2 s at most.')
  assert last.startswith('error: not all processes came at localhost:')
  assert 'Look at the output of each' in last


def test_sigterm_ends_who_waits_for_the_devices_of_others_and_later():
  kill = 'os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)'
  code, said = alone(f"""
def exchange(value):
  print('all have come', file=sys.stderr)
  {kill}
processes.allgather = exchange
start(1, 0)
processes.first_barrier()
""")
  assert code == -signal.SIGTERM and 'all have come' in said
