"""Processes of a run, one at a time; real runs of two are in test_pair.py."""

import os
import subprocess
import sys

import jax
import numpy as np
import processes as started
import pytest

from actfocus_jax import errors
from actfocus_jax.parallel import processes
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


# --- Clusters ----------------------------------------------------------------


@pytest.mark.parametrize(
  ('environ', 'name'),
  [
    ({}, None),
    (SLURM, 'Slurm'),
    (SLURM | {'SLURM_NTASKS': '1'}, None),
    ({'SLURM_NTASKS': '2'}, None),  # In the allocation, but not by srun.
    (SLURM | {'SLURM_STEP_NUM_TASKS': '1'}, None),  # The shell of salloc.
    (SLURM | {'SLURM_NTASKS': '1', 'SLURM_STEP_NUM_TASKS': '2'}, 'Slurm'),
    (OPEN_MPI_4, 'Open MPI'),
    (OPEN_MPI_5, 'Open MPI 5'),
    (OPEN_MPI_5 | SLURM, 'Open MPI 5'),  # Its daemons are steps of Slurm.
    (OPEN_MPI_5 | {'OMPI_COMM_WORLD_SIZE': '1'}, None),
    (SLURM | {'PMIX_NAMESPACE': 'slurm.pmix'}, 'Slurm'),
    ({'TPU_WORKER_HOSTNAMES': 'a'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 'a TPU pod'),
    ({'MEGASCALE_NUM_SLICES': '1'}, None),
    ({'MEGASCALE_NUM_SLICES': '2'}, 'several TPU slices'),
    # It may be one of a sweep.
    ({'KUBERNETES_SERVICE_HOST': 'h', 'JOB_COMPLETION_INDEX': '0'}, None),
  ],
)
def test_cluster_name_by_environment(environ, name):
  assert processes.cluster_name(environ) == name


def test_count_and_index_only_of_open_mpi_5():
  assert processes.count_and_index(OPEN_MPI_5) == (4, 3)
  for known_to_jax in ({}, SLURM, OPEN_MPI_4):
    assert processes.count_and_index(known_to_jax) is None


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
def test_local_devices_all_for_one_process_per_machine(environ, devices):
  assert processes.local_devices(environ) == devices


# --- Starting and ending -----------------------------------------------------


def run_alone(code):
  """Run code in a process of its own; return its exit code and stderr."""
  begin = f"""
import os, signal, sys, time
import jax
from actfocus_jax import errors
from actfocus_jax.cli import cluster
from actfocus_jax.parallel import processes
processes._JOIN_WITHIN, processes._REPORT_AFTER = 2.0, 1.0
def start(count, index, **more):
  who = dict(num_processes=count, process_id=index)
  address = 'localhost:{started.free_port()}'
  processes.start(coordinator=address, **who, **more)
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
def test_start_without_the_others_ends_with_one_sentence(index):
  code, printed = run_alone(f'start(2, {index})')
  assert code == 1
  first, last = printed.strip().splitlines()[-2:]
  assert first.startswith('Waiting for the other processes at localhost:')
  assert first.endswith(', 2 s at most.')
  assert last.startswith('error: not all processes came at localhost:')
  assert 'Look at the output of each' in last


def test_start_sigterm_in_the_first_barrier_ends_the_process():
  code, printed = run_alone("""
def allgather(value):
  print('all have come', file=sys.stderr)
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(5)
processes.allgather = allgather
start(1, 0)
processes.first_barrier()
""")
  assert code == -15 and 'all have come' in printed


@pytest.mark.parametrize(
  'count', ['return 2', 'raise RuntimeError("Unable to initialize backend")']
)
def test_first_barrier_loss_of_another_process_is_one_sentence(count):
  code, printed = run_alone(f"""
def count():
  {count}
def allgather(value):
  processes.count = count
  raise jax.errors.JaxRuntimeError('Gloo: closed')
processes.allgather = allgather
processes.start = lambda **arguments: None
cluster.flags.FLAGS(['x', '--distributed=on'])
with cluster.joined():
  pass
""")
  assert code == 1
  assert printed.startswith('error: another process has ended, or cannot be ')
  assert printed.endswith('(Gloo: closed)\n') and 'Traceback' not in printed


def test_check_devices_unequal_numbers_are_refused():
  processes.check_devices([0, 0, 1, 1])
  with pytest.raises(
    errors.UsageError, match='Process 0 has 2 devices and process 1 has 3; '
  ):
    processes.check_devices([0, 0, 1, 1, 1])


# Process 0 stays for the others, which may have the same error, unless one of
# them is lost.
@pytest.mark.parametrize(
  ('index', 'error', 'exit_code', 'printed', 'stays'),
  [
    (0, "errors.UsageError('no')", 2, 'error: no\n', True),
    (1, "errors.RunError('bad')", 1, 'error: bad\n', False),
    (1, "errors.Stopped('stop', 143)", 143, 'error: stop\n', False),
    (0, "FloatingPointError('x')", 1, 'FloatingPointError: x\n', True),
    (0, "jax.errors.JaxRuntimeError('Gloo')", 1, '(Gloo)\n', False),
    (0, 'KeyboardInterrupt', 1, 'KeyboardInterrupt\n', False),
  ],
)
def test_exit_on_error_ends_the_process_at_once(
  index, error, exit_code, printed, stays
):
  code, output = run_alone(f"""
import atexit
processes.count, processes.index = lambda: 2, lambda: {index}
time.sleep = lambda seconds: print(f'stays {{seconds:g}} s', file=sys.stderr)
atexit.register(lambda: print('waited for the others', file=sys.stderr))
with processes.exit_on_error():
  raise {error}
""")
  assert code == exit_code
  assert output.endswith(printed + 'stays 5 s\n' * stays)


def test_exit_on_error_without_a_device_stays_for_the_others():
  """Without devices it cannot know that it is not process 0."""
  code, printed = run_alone("""
os.environ['JAX_PLATFORMS'] = 'cuda'
jax.config.update('jax_platforms', 'cuda')
start(1, 0)
time.sleep = lambda seconds: print(f'stays {seconds:g} s', file=sys.stderr)
with processes.exit_on_error():
  processes.first_barrier()
""")
  assert code == 2
  assert printed.startswith(
    "error: JAX_PLATFORMS is 'cuda', for which jax finds no"
  )
  assert printed.endswith('stays 5 s\n')


@pytest.mark.parametrize(
  ('error', 'is_loss'),
  [
    (jax.errors.JaxRuntimeError('UNKNOWN: Gloo AllGather failed: ...'), True),
    (jax.errors.JaxRuntimeError('Connection reset by peer'), True),
    (jax.errors.JaxRuntimeError('[CoordinationServiceError=]'), True),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory'), False),
    (OSError('Connection reset by peer'), False),
  ],
)
def test_is_loss_only_of_a_collective(error, is_loss):
  assert processes.is_loss(error) is is_loss


# --- Agreeing ----------------------------------------------------------------


def test_single_process_needs_no_collective():
  assert (processes.count(), processes.index()) == (1, 0)
  assert processes.is_first()
  assert processes.allgather({'a': 1}) == [{'a': 1}]
  assert processes.first_non_none(None) is None
  assert processes.first_non_none('SIGTERM') == 'SIGTERM'
  assert processes.broadcast(7) == 7
  processes.check_equal(1, 'x', 'y')
  for context in (processes.exit_on_error, processes.raise_everywhere):
    with pytest.raises(errors.UsageError, match='^no$'), context():
      raise errors.UsageError('no')


@pytest.mark.parametrize('length', [3, 1010, 1018, 1019, 1020, 5000, 70_000])
def test_allgather_values_of_any_length(monkeypatch, length):
  """A short message fits the first frame; both edges of it by one byte."""
  widths = []

  def process_allgather(row):
    widths.append(row.size)
    return np.stack([row, row])

  monkeypatch.setattr(processes, 'count', lambda: 2)
  monkeypatch.setattr(
    processes.multihost_utils, 'process_allgather', process_allgather
  )
  value = bytes(range(256)) * (length // 256) + bytes(length % 256)
  assert processes.allgather(value) == [value, value]
  assert widths[0] == 1024 and len(widths) == 1 + (length > 1000)


def gather(monkeypatch, *values):
  monkeypatch.setattr(processes, 'allgather', lambda value: list(values))


def test_agreeing_by_hand(monkeypatch):
  gather(monkeypatch, None, 'SIGTERM', 'SIGINT')
  assert processes.first_non_none(None) == 'SIGTERM'
  gather(monkeypatch, [1, 2, 3], [3, 2], [2, 3, 4])
  assert processes.common([1, 2, 3]) == [2, 3]
  assert processes.broadcast([1, 2, 3]) == [1, 2, 3]
  gather(monkeypatch, 'a', 'a', 'b')
  sentence = "'a' in process 0 and 'b' in process 2; allowed: one."
  with pytest.raises(errors.UsageError, match=sentence):
    processes.check_equal('a', 'the model', 'one')


def as_process(monkeypatch, index, other):
  """Make this process one of two; the other one gathers a fixed value."""
  monkeypatch.setattr(processes, 'count', lambda: 2)
  monkeypatch.setattr(processes, 'index', lambda: index)

  def allgather(value):
    values = [other, other]
    values[index] = value
    return values

  monkeypatch.setattr(processes, 'allgather', allgather)


def test_env_pool_runs_own_calls_and_shares_outcomes(monkeypatch):
  as_process(monkeypatch, 1, {0: 'far', 2: env_pool.Failed('far away')})
  ran = []

  def call(i):
    return lambda: ran.append(i) or (f'state {i}', f'text {i}')

  calls = [call(i) for i in range(4)]
  owners = [{0}, {1}, {0}, {0, 1}]
  outcomes = env_pool.EnvPool().run_and_share(calls, owners)
  assert ran == [1, 3]
  assert outcomes == [
    (None, 'far'),
    ('state 1', 'text 1'),
    env_pool.Failed('far away'),
    ('state 3', 'text 3'),
  ]


def test_env_pool_failure_in_one_process_is_failure_in_all(monkeypatch):
  as_process(monkeypatch, 1, {0: env_pool.Failed('over there')})
  outcomes = env_pool.EnvPool().run_and_share(
    [lambda: ('state', 'text')], [{0, 1}]
  )
  assert outcomes == [env_pool.Failed('over there')]


@pytest.mark.parametrize(
  ('own', 'other', 'sentence'),
  [
    ('no', 'no', 'no'),
    ('no', None, 'process 0: no'),
    (None, 'never', 'process 1: never'),
    ('no', 'never', 'process 0: no'),
  ],
)
def test_raise_everywhere_refusal_of_one_is_raised_in_all(
  monkeypatch, own, other, sentence
):
  as_process(monkeypatch, 0, other)
  refused = pytest.raises(errors.UsageError, match=f'^{sentence}$')
  with refused, processes.raise_everywhere():
    if own:
      raise errors.UsageError(own)


def test_raise_everywhere_without_refusal_or_with_a_failure(monkeypatch):
  as_process(monkeypatch, 0, None)
  with processes.raise_everywhere():
    pass
  # A failure is not shared: the others end with this process.
  monkeypatch.setattr(
    processes, 'allgather', lambda value: pytest.fail('a collective')
  )
  with pytest.raises(OSError, match='disk'), processes.raise_everywhere():
    raise OSError('disk')
