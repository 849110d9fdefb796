"""The quick start on two processes: the same run, and its ways to end."""

import json
import signal
import time

import processes
import pytest

pytestmark = pytest.mark.slow

# The quick start with a shorter warm start and smaller evaluations.
SHORTER = (
  '--config.eval.prompts=8',
  '--config.eval.members=2',
  '--config.eval.save=2',
  '--config.eval.every=0',
  '--config.checkpoint.every=2',
  '--config.warm_start.episodes=128',
  '--config.warm_start.steps=60',
)
# Of the clock, or of what rounding makes of it.
NOT_COMPARED = ('time/', 'seconds', 'per_second', 'compiles', 'share_of')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  return tmp_path_factory.mktemp('several')


def command(place, name, steps, *more):
  return [
    '--config=configs/quickstart.py',
    *SHORTER,
    f'--config.warm_start.cache={place / "warm_starts"}',
    f'--config.num_steps={steps}',
    '--config.mesh.fsdp=2',
    f'--workdir={place / name}',
    *more,
  ]


def train(count, arguments):
  done = processes.finish(processes.start(count, arguments))
  assert [code for code, _ in done] == [0] * count, done
  return [output for _, output in done]


def rows(workdir, name='metrics.jsonl'):
  file = workdir / name
  if not file.exists():
    return []
  return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope='module')
def alone(place):
  """One process of eight devices; also makes the warm start."""
  train(1, command(place, 'alone', 3))
  return place / 'alone'


@pytest.fixture(scope='module')
def together(place, alone):
  """Two processes of four devices each, and what they printed."""
  outputs = train(2, command(place, 'together', 3))
  return place / 'together', outputs


@pytest.mark.parametrize('name', ['metrics.jsonl', 'eval.jsonl'])
def test_two_processes_make_the_run_of_one(alone, together, name):
  workdir, _ = together
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


def test_only_the_first_process_talks_and_writes(together):
  workdir, (first, second) = together
  assert 'step 3: held-out success' in first
  assert 'The report is in' in first
  assert 'held-out success' not in second and 'The report' not in second
  files = {file.name for file in workdir.iterdir()}
  assert {'config.json', 'model.json', 'baselines.json', 'report'} <= files
  assert len(rows(workdir)) == 3


def test_death_of_a_process_ends_the_other_and_the_run_goes_on(place, together):
  workdir, _ = together
  started = processes.start(2, command(place, 'together', 200))
  processes.wait_for(lambda: len(rows(workdir)) >= 6, started)
  started[1].kill()
  begin = time.monotonic()
  (code, output), _ = processes.finish(started, timeout=90)
  assert code not in (0, None)
  assert time.monotonic() - begin < 60
  last = output.partition('train 6/200')[2]
  assert 'another task died' in last or 'Gloo' in last

  steps = [row['step'] for row in rows(workdir)]
  last = max(
    int(d.name) for d in (workdir / 'checkpoints').iterdir() if d.name.isdigit()
  )
  assert last >= 4
  train(2, command(place, 'together', last + 1))
  assert [row['step'] for row in rows(workdir)] == list(range(1, last + 2))
  assert steps == list(range(1, len(steps) + 1))


def test_a_signal_to_one_process_saves_and_ends_both(place, together):
  workdir, _ = together
  before = len(rows(workdir))
  started = processes.start(2, command(place, 'together', 200))
  processes.wait_for(lambda: len(rows(workdir)) >= before + 1, started)
  started[1].send_signal(signal.SIGTERM)
  (code, output), (second, _) = processes.finish(started)
  assert (code, second) == (143, 143), output
  done = len(rows(workdir))
  assert f'Stopped by SIGTERM after step {done} of 200, saved' in output
  assert (workdir / 'checkpoints' / str(done)).is_dir()


def test_processes_with_other_configs_are_refused(place, together):
  first = command(place, 'other', 3)
  port = processes.free_port()

  def who(i):
    return [
      f'--coordinator=localhost:{port}',
      '--num_processes=2',
      f'--process_id={i}',
    ]

  started = [
    *processes.start(1, [*first, *who(0)], devices=4),
    *processes.start(1, [*first, '--config.seed=5', *who(1)], devices=4),
  ]
  done = processes.finish(started)
  for code, output in done:
    assert code == 2
    assert 'seed is 0 in process 0 and 5 in process 1' in output
  assert not (place / 'other').exists()
