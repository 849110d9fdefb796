"""What a process knows of the others; collectives are tested by whole runs."""

import os
import subprocess
import sys

import numpy as np
import pytest

from actfocus_jax.agent import host
from actfocus_jax.parallel import processes
from actfocus_jax.run import refusals

SLURM = {'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_NTASKS': '2'}


@pytest.mark.parametrize(
  ('environ', 'found'),
  [
    ({}, None),
    (SLURM, 'Slurm'),
    (SLURM | {'SLURM_NTASKS': '1'}, None),
    ({'SLURM_NTASKS': '2'}, None),  # In the allocation, but not by srun.
    (
      {'OMPI_MCA_orte_hnp_uri': '1', 'OMPI_COMM_WORLD_SIZE': '4'},
      'Open MPI',
    ),
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
  assert processes.several(environ) == found


def test_one_process_exchanges_with_itself():
  assert (processes.count(), processes.index()) == (1, 0)
  assert processes.is_first()
  assert processes.exchange({'a': 1}) == [{'a': 1}]
  assert processes.first_said(None) is None
  assert processes.first_said('SIGTERM') == 'SIGTERM'
  assert processes.of_first(7) == 7
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
  assert processes.exchange(value) == [value, value]
  assert widths[0] == 1024 and len(widths) == 1 + (length > 1000)


def said_by(monkeypatch, *values):
  monkeypatch.setattr(processes, 'exchange', lambda value: list(values))


def test_processes_that_differ_are_told_apart(monkeypatch):
  said_by(monkeypatch, 'a', 'a', 'b')
  told = "'a' in process 0 and 'b' in process 2; allowed: one."
  with pytest.raises(refusals.Refused, match=told):
    processes.check_equal('a', 'the model', 'one')


def test_the_first_who_says_something_is_heard(monkeypatch):
  said_by(monkeypatch, None, 'SIGTERM', 'SIGINT')
  assert processes.first_said(None) == 'SIGTERM'


def as_process(monkeypatch, index, others_said):
  """Makes this process one of two; the other one's words are given."""
  monkeypatch.setattr(processes, 'count', lambda: 2)
  monkeypatch.setattr(processes, 'index', lambda: index)

  def exchange(value):
    said = [others_said, others_said]
    said[index] = value
    return said

  monkeypatch.setattr(processes, 'exchange', exchange)


def test_a_process_runs_its_own_calls_and_is_told_of_the_others(monkeypatch):
  as_process(monkeypatch, 1, {0: 'far', 2: host.Failed('far away')})
  ran = []

  def call(i):
    return lambda: ran.append(i) or (f'state {i}', f'text {i}')

  calls = [call(i) for i in range(4)]
  owners = [{0}, {1}, {0}, {0, 1}]
  # What both own is told by both; the state is this process's own.
  outcomes = host.Host().run(calls, owners)
  assert ran == [1, 3]
  assert outcomes == [
    (None, 'far'),
    ('state 1', 'text 1'),
    host.Failed('far away'),
    ('state 3', 'text 3'),
  ]


def test_a_call_fails_everywhere_where_it_failed_anywhere(monkeypatch):
  as_process(monkeypatch, 1, {0: host.Failed('over there')})
  outcomes = host.Host().run([lambda: ('state', 'text')], [{0, 1}])
  assert outcomes == [host.Failed('over there')]


def test_failure_ends_the_process_at_once(tmp_path):
  code = """
import atexit, os
from actfocus_jax.parallel import processes
from actfocus_jax.run import refusals
processes.count = lambda: 2
atexit.register(lambda: print('waited for the others'))
with processes.leaving():
  raise {error}
"""
  expected = {
    "refusals.Refused('no')": (2, 'error: no\n'),
    "refusals.Halted('bad')": (1, 'error: bad\n'),
    "ValueError('x')": (1, 'ValueError: x\n'),
  }
  for error, (exit_code, said) in expected.items():
    done = subprocess.run(
      [sys.executable, '-c', code.replace('{error}', error)],
      capture_output=True,
      text=True,
      env={**os.environ, 'PYTHONPATH': os.getcwd()},
      timeout=60,
    )
    assert done.returncode == exit_code
    assert done.stderr.endswith(said)
    assert 'waited' not in done.stdout


def test_one_process_raises_as_ever():
  with pytest.raises(refusals.Refused), processes.leaving():
    raise refusals.Refused('no')
