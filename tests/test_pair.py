"""Two processes of one run: equal to one, refusals, and how both end."""

import json
import pathlib
import shutil
import time

import jax
import pair
import processes
import pytest

from actfocus_jax import loop
from actfocus_jax.run import metrics

pytestmark = pytest.mark.slow

# Times, and what depends on the number of processes.
NOT_COMPARED = ('time/', 'seconds', 'per_second', 'compiles', 'environment')


@pytest.fixture(scope='module', autouse=True)
def ordinary_promotion():
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """Folder with a run of three steps of one process of eight devices."""
  folder = tmp_path_factory.mktemp('pair')
  c = pair.config(folder, num_steps=3, checkpoint__keep=3)
  loop.train(c, folder / 'alone')
  return folder


def prepare(folder: pathlib.Path):
  """Copy the run after its first step, and files for each of two machines."""
  (folder / 'seen').mkdir()
  run = folder / 'run'
  shutil.copytree(folder / 'alone', run)
  shutil.rmtree(run / 'checkpoints' / '2')
  shutil.rmtree(run / 'checkpoints' / '3')
  (model,) = (p for p in (folder / 'warm_starts').iterdir() if p.is_dir())
  for host in (folder / 'hosts' / '0', folder / 'hosts' / '1'):
    shutil.copytree(model, host / 'same')
    shutil.copytree(model, host / 'other')
    shutil.copytree(run, host / 'run')
  shutil.rmtree(host / 'run' / 'checkpoints')
  with (host / 'other' / 'config.json').open('a') as file:
    file.write('\n')


@pytest.fixture(scope='module')
def ended(alone):
  """Exit codes and outputs of both processes, and the time of their end."""
  prepare(alone)
  code = pathlib.Path(pair.__file__).read_text()
  started = processes.start(2, [alone], devices=pair.DEVICES, code=code)
  done = processes.finish(started)
  for _, output in done:
    print(output)
  return done, time.time()


@pytest.fixture(scope='module')
def seen(alone, ended):
  """(name) -> the results of both processes in a scenario."""

  def both(name):
    files = [alone / 'seen' / f'{name}-{i}.json' for i in (0, 1)]
    assert all(file.exists() for file in files), ended
    return [json.loads(file.read_text()) for file in files]

  return both


def compared(row):
  return {
    key: value
    for key, value in row.items()
    if not any(word in key for word in NOT_COMPARED)
  }


def assert_close(ours, theirs):
  assert ours.keys() == theirs.keys()
  for key, value in compared(theirs).items():
    loose = 'sampler_gap' in key
    assert ours[key] == pytest.approx(
      value, rel=1e-4, abs=1e-4 if loose else 1e-6
    ), key


def test_one_process_then_two_then_one_equal_one(alone, seen):
  assert seen('resumes') == [[2], [2]]
  loop.train(pair.config(alone, num_steps=3), alone / 'run')
  ours = metrics.read(alone / 'run' / 'metrics.jsonl')
  theirs = metrics.read(alone / 'alone' / 'metrics.jsonl')
  assert [row['step'] for row in ours] == [1, 2, 3]
  for our, their in zip(ours, theirs, strict=True):
    assert_close(our, their)


def test_two_processes_evaluate_as_one(alone, seen):
  seen('resumes')  # Step 2 is there.
  outputs = processes.finished(
    processes.start(
      2,
      [f'--workdir={alone / "run"}', '--step=2'],
      module='actfocus_jax.evaluate',
      devices=2,
    )
  )
  first, second = outputs
  line = next(text for text in first.splitlines() if text.startswith('{'))
  rows = metrics.read(alone / 'run' / 'eval.jsonl')
  (row,) = (row for row in rows if row['step'] == 2)
  assert_close(json.loads(line), row)
  assert 'held-out success' in first and 'held-out success' not in second


def test_environment_that_fails_in_one_process_costs_its_episode(seen):
  first, second = seen('breaks')
  assert [compared(row) for row in first] == [compared(row) for row in second]
  assert first[0]['failed'] == 2 / 16


def test_heads_split_over_both_processes_equal_one(alone, seen):
  first, second = seen('spans')
  assert [compared(row) for row in first] == [compared(row) for row in second]
  (row,) = (row for row in first if 'actor/loss' in row)
  assert_close(row, metrics.read(alone / 'alone' / 'metrics.jsonl')[0])


@pytest.mark.parametrize('name', ['other_model', 'evaluate_other'])
def test_model_files_that_differ_are_refused(alone, seen, name):
  first, second = seen(name)
  assert first == second
  assert first.startswith('the sha256 of other is ')
  assert 'in process 1; allowed: the same files in all processes' in first
  assert not (alone / 'never').exists()


def test_directory_unseen_by_one_process_is_refused(alone, seen):
  first, second = seen('not_shared')
  assert first == second
  assert '--workdir is mine, but process 1 does not see' in first
  hosts = alone / 'hosts'
  assert not (hosts / '1' / 'mine').exists()
  assert list((hosts / '0' / 'mine').iterdir()) == []
  first, second = seen('evaluate_not_shared')
  assert first == second
  assert 'the checkpoints in run are: none' in first


def test_locked_directory_is_refused_in_all_processes(seen):
  first, second = seen('locked')
  assert first == second
  assert 'where another process is training' in first


def test_signal_in_an_evaluation_stops_both_after_it(alone, seen):
  assert seen('stopped') == [143, 143]
  run = alone / 'stopped'
  assert [row['step'] for row in metrics.read(run / 'eval.jsonl')] == [0]
  assert not (run / 'metrics.jsonl').exists()
  assert not (run / 'checkpoints').exists()


def test_failure_of_one_process_ends_both(alone, ended):
  ((code, failed), (other, output)), end = ended
  begin = json.loads((alone / 'seen' / 'fails-0.json').read_text())
  assert code == 1 and other not in (0, None)
  assert end - begin < 60
  assert failed.rstrip().endswith('OSError: [Errno 28] No space left on device')
  assert 'another task died' in output or 'Gloo' in output
  rows = metrics.read(alone / 'fails' / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [1]
