"""The quick start on two processes: the same run, and its ways to end."""

import json
import signal
import time

import processes
import pytest
import small_run

pytestmark = pytest.mark.slow

# The quick start with a shorter warm start and smaller evaluations.
SHORTER = {
  'eval.prompts': 8,
  'eval.members': 2,
  'eval.save': 2,
  'eval.every': 0,
  'checkpoint.every': 2,
  'warm_start.episodes': 64,
  'warm_start.steps': 20,
  'mesh.fsdp': 2,
}
# For what does not look at numbers: a run of steps that take no time.
SMALL = SHORTER | {'mesh.fsdp': 1} | small_run.INSTANT
# Of the clock, or of what rounding makes of it.
NOT_COMPARED = ('time/', 'seconds', 'per_second', 'compiles', 'share_of')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  return tmp_path_factory.mktemp('several')


def command(place, name, steps, config=SHORTER):
  fields = {
    'warm_start.cache': place / 'warm_starts',
    'num_steps': steps,
  } | config
  return [
    f'--config={processes.ROOT / "configs" / "quickstart.py"}',
    *(f'--config.{field}={value}' for field, value in fields.items()),
    f'--workdir={place / name}',
  ]


def start_small(place, name, *, before=processes.IMPATIENT, **others):
  """Two processes of one device each, in a run that does not end by itself."""
  arguments = command(place, name, 10_000, SMALL | others)
  return processes.start(2, arguments, devices=2, before=before)


def rows(workdir, name='metrics.jsonl'):
  file = workdir / name
  if not file.exists():
    return []
  return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope='module')
def quick_start(place):
  """One process of eight devices, and two of four; what the two printed.

  Both at a time, for they wait a lot: one makes the warm start for all.
  """
  much = {'computes_little': False}
  one = processes.start(1, command(place, 'alone', 3), **much)
  two = processes.start(2, command(place, 'together', 3), **much)
  processes.finished(one)
  return place / 'alone', place / 'together', processes.finished(two)


@pytest.mark.parametrize('name', ['metrics.jsonl', 'eval.jsonl'])
def test_two_processes_make_the_run_of_one(quick_start, name):
  alone, workdir, _ = quick_start
  ours, theirs = rows(workdir, name), rows(alone, name)
  assert len(ours) == len(theirs) == {'metrics.jsonl': 3, 'eval.jsonl': 2}[name]
  for our, their in zip(ours, theirs, strict=True):
    assert our.keys() == their.keys()
    for key, value in their.items():
      if any(word in key for word in NOT_COMPARED) or 'environment' in key:
        continue
      # Rounding differs with the sums of four devices and of two.
      loose = 'sampler_gap' in key
      assert our[key] == pytest.approx(
        value, rel=1e-4, abs=1e-4 if loose else 1e-6
      ), key


def test_only_the_first_process_talks_and_writes(quick_start):
  _, workdir, (first, second) = quick_start
  assert 'step 3: held-out success' in first
  assert 'The report is in' in first
  assert 'held-out success' not in second and 'The report' not in second
  files = {file.name for file in workdir.iterdir()}
  assert {'config.json', 'model.json', 'baselines.json', 'report'} <= files
  assert len(rows(workdir)) == 3


def last_checkpoint(workdir):
  names = (folder.name for folder in (workdir / 'checkpoints').iterdir())
  return max(int(name) for name in names if name.isdigit())


@pytest.fixture(scope='module')
def killed(place):
  """A run of two, one of which was killed; how the other ended, and when."""
  started = start_small(place, 'small')
  workdir = place / 'small'
  processes.wait_for(lambda: len(rows(workdir)) >= 4, started)
  started[1].kill()
  begin = time.monotonic()
  first, _ = processes.finish(started, timeout=90)
  return workdir, first, time.monotonic() - begin


def test_death_of_a_process_ends_the_other(killed):
  workdir, (code, output), seconds = killed
  assert code not in (0, None)
  assert seconds < 30  # Its heartbeat is waited for 6 seconds here, else 30.
  assert 'another task died' in output or 'Gloo' in output
  steps = [row['step'] for row in rows(workdir)]
  assert steps == list(range(1, len(steps) + 1))


def test_it_goes_on_until_a_signal_to_one_saves_and_ends_both(place, killed):
  workdir, _, _ = killed
  before, there = last_checkpoint(workdir), len(rows(workdir))
  assert 2 <= before <= there
  started = start_small(place, 'small', **{'checkpoint.every': 10_000})
  processes.wait_for(lambda: len(rows(workdir)) > there, started)
  started[1].send_signal(signal.SIGTERM)
  (code, output), (second, _) = processes.finish(started)
  assert (code, second) == (143, 143), output
  assert f'Going on from step {before}' in output
  done = len(rows(workdir))
  assert [row['step'] for row in rows(workdir)] == list(range(1, done + 1))
  assert f'Stopped by SIGTERM after step {done} of 10000, saved' in output
  assert done > there and last_checkpoint(workdir) == done


# Each process on a disk of its own, where both make the warm start.
STOPS = """
import os, signal, sys
from actfocus_jax.warmstart import supervised
_step = supervised.step
def step(*arguments, **more):
  os.kill(os.getpid(), signal.SIGTERM)
  return _step(*arguments, **more)
is_second = '--process_id=1' in sys.argv
if is_second:
  supervised.step = step
os.mkdir(f'PLACE/{is_second}')
os.chdir(f'PLACE/{is_second}')
"""


def test_a_signal_in_the_warm_start_of_one_ends_both(place, tmp_path):
  before = processes.IMPATIENT + STOPS.replace('PLACE', str(tmp_path))
  endless = {'warm_start.steps': 100_000, 'warm_start.cache': 'cache'}
  started = start_small(place, 'stopped', before=before, **endless)
  (first, _), (code, output) = processes.finish(started, timeout=90)
  assert code == 143
  assert 'Stopped by SIGTERM during the warm start' in output
  assert first not in (0, None)
  assert not (place / 'stopped').exists()


def test_what_one_process_refuses_both_refuse(place, tmp_path):
  """With other configs, and where something is wrong on one machine."""
  file = tmp_path / 'file'
  file.touch()
  cases = {
    '--config.seed=5': 'seed is 0 in process 0 and 5 in process 1',
    f'--workdir={file}': f'process 1: --workdir is {file}, which is a file.',
  }
  pairs = [
    processes.start(
      2, command(place, 'other', 3), devices=2, own={1: [argument]}
    )
    for argument in cases
  ]
  for pair, sentence in zip(pairs, cases.values(), strict=True):
    for code, output in processes.finish(pair):
      assert code == 2
      errors = [line for line in output.splitlines() if 'error:' in line]
      assert len(errors) == 1 and sentence in errors[0]
  assert not (place / 'other').exists()
