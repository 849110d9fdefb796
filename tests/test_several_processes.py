"""The quick start on two processes: kill, signals, refusals."""

import json
import signal
import time

import processes
import pytest
import small_run

pytestmark = pytest.mark.slow

# The quick start with steps that take no time.
SMALL = small_run.INSTANT | {
  'checkpoint.every': 2,
  'warm_start.episodes': 64,
  'warm_start.steps': 20,
}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  return tmp_path_factory.mktemp('several')


def command(place, name, steps, **changes):
  fields = {'warm_start.cache': place / 'warm_starts', 'num_steps': steps}
  fields = SMALL | fields | changes
  return [
    f'--config={processes.ROOT / "configs" / "quickstart.py"}',
    *(f'--config.{field}={value}' for field, value in fields.items()),
    f'--workdir={place / name}',
  ]


def start_small(place, name, *, before=processes.IMPATIENT, **others):
  """Start two processes of one device each in a run without an end."""
  arguments = command(place, name, 10_000, **others)
  return processes.start(2, arguments, devices=2, before=before)


def rows(workdir):
  file = workdir / 'metrics.jsonl'
  if not file.exists():
    return []
  return [json.loads(line) for line in file.read_text().splitlines()]


def last_checkpoint(workdir):
  names = (folder.name for folder in (workdir / 'checkpoints').iterdir())
  return max(int(name) for name in names if name.isdigit())


@pytest.fixture(scope='module')
def killed(place):
  """Run of two after one was killed; how and when the other ended."""
  started = start_small(place, 'small')
  workdir = place / 'small'
  processes.wait_for(lambda: len(rows(workdir)) >= 4, started)
  started[1].kill()
  begin = time.monotonic()
  first, _ = processes.finish(started, timeout=90)
  return workdir, first, time.monotonic() - begin


def test_killed_process_ends_the_other(killed):
  workdir, (code, output), seconds = killed
  assert code not in (0, None)
  assert seconds < 30  # The heartbeat timeout is 6 seconds here, otherwise 30.
  assert 'another task died' in output or 'Gloo' in output
  steps = [row['step'] for row in rows(workdir)]
  assert steps == list(range(1, len(steps) + 1))


def test_killed_run_resumes_until_a_signal_to_one_ends_both(place, killed):
  workdir, _, _ = killed
  before, there = last_checkpoint(workdir), len(rows(workdir))
  assert 2 <= before <= there
  started = start_small(place, 'small', **{'checkpoint.every': 10_000})
  processes.wait_for(lambda: len(rows(workdir)) > there, started)
  started[1].send_signal(signal.SIGTERM)
  (code, output), (second, silent) = processes.finish(started)
  assert (code, second) == (143, 143), output
  assert f'Going on from step {before}' in output
  done = len(rows(workdir))
  assert [row['step'] for row in rows(workdir)] == list(range(1, done + 1))
  assert f'Stopped by SIGTERM after step {done} of 10000, saved' in output
  assert done > there and last_checkpoint(workdir) == done
  # Only process 0 prints.
  assert 'The report is in' in output
  assert 'The report' not in silent and 'Stopped by' not in silent


# Each process has its own disk, so both make the warm start.
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


def test_signal_in_the_warm_start_of_one_ends_both(place, tmp_path):
  before = processes.IMPATIENT + STOPS.replace('PLACE', str(tmp_path))
  endless = {'warm_start.steps': 100_000, 'warm_start.cache': 'cache'}
  started = start_small(place, 'stopped', before=before, **endless)
  (first, _), (code, output) = processes.finish(started, timeout=90)
  assert code == 143
  assert 'Stopped by SIGTERM during the warm start' in output
  assert first not in (0, None)
  assert not (place / 'stopped').exists()


def test_refusal_of_one_process_is_that_of_both(place, tmp_path):
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
