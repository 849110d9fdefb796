"""Run directories: locks, kills, changed configs, several processes."""

import contextlib
import json

import numpy as np
import pytest

from actfocus_jax import errors
from actfocus_jax.cli import paths
from actfocus_jax.config import schema
from actfocus_jax.parallel import processes
from actfocus_jax.run import directory, metrics, storage

FIRST = schema.FIRST_TRAINING_SEED


def open_directory(workdir, c=None, **model):
  config = schema.to_json(schema.defaults() if c is None else c)
  return directory.RunDirectory(workdir, config, {'sha256': ''} | model)


def contents(workdir):
  return {
    file: file.read_bytes() for file in workdir.rglob('*') if file.is_file()
  }


# --- Kills and failures ------------------------------------------------------


def test_kill_before_the_config_is_written_leaves_no_run(tmp_path, monkeypatch):
  c, write = schema.defaults(), storage.write

  def killed(path, content):
    if path.name == 'config.json':
      raise KeyboardInterrupt
    write(path, content)

  first = open_directory(tmp_path, c, sha256='a', commit='a1b2')
  with monkeypatch.context() as patch:
    patch.setattr(storage, 'write', killed)
    with pytest.raises(KeyboardInterrupt):
      first.__enter__()
  assert {p.name for p in tmp_path.iterdir()} == {'.lock', 'model.json'}
  # Another config and another model may begin there, as in an empty directory.
  c.seed, c.model.path = 1, 'qwen/qwen'
  paths.check_workdir(tmp_path, c)
  paths.pin_model(c, tmp_path)
  assert c.model.revision == ''
  with open_directory(tmp_path, c, sha256='b'):
    pass
  with pytest.raises(errors.UsageError, match='are not those that the run'):
    open_directory(tmp_path, c, sha256='a', path='x')


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_failed_opening_releases_the_lock(tmp_path, monkeypatch, error):
  kept = []

  def fail(run, *arguments):
    kept.append(run)  # As the frames of a traceback would.
    raise error

  with monkeypatch.context() as patch, pytest.raises(error):
    patch.setattr(directory.RunDirectory, 'write', fail)
    open_directory(tmp_path).__enter__()
  assert kept
  open_directory(tmp_path).__exit__()


def test_failed_checkpoint_releases_the_lock(tmp_path):
  run = open_directory(tmp_path)

  def fail():
    raise ValueError('disk full')

  run._checkpoints.wait = fail
  with pytest.raises(ValueError, match='disk full'), run:
    pass
  open_directory(tmp_path).__exit__()


WRITES = {
  'write': lambda run: run.write('baselines.json', {}),
  'write_episodes': lambda run: run.write_episodes(1, [{}]),
  'save': lambda run: run.save(2, {'x': np.zeros(1)}, None, 0),
  'restore': lambda run: run.restore(None),
  'metrics': lambda run: run.metrics.append({'step': 2}),
  'evaluations': lambda run: run.evaluations.append({'step': 2}),
}


class LostLease(directory.locks.Lease):
  """Lease that another process has taken."""

  def __init__(self):
    pass

  def check(self):
    raise errors.RunError('Another process has taken')

  def close(self):
    pass


@pytest.mark.parametrize('name', WRITES)
def test_lost_lease_nothing_is_written(tmp_path, name):
  with open_directory(tmp_path) as run:
    run.metrics.append({'step': 1})
    run.evaluations.append({'step': 1})
    run.write_episodes(3, [{}])
    with contextlib.closing(run._lock):
      run._lock = LostLease()
    before = contents(tmp_path)
    with pytest.raises(errors.RunError, match='Another process has taken'):
      WRITES[name](run)
    assert contents(tmp_path) == before


# --- Another config ----------------------------------------------------------


def changes(workdir):
  return metrics.read(workdir / 'config_changes.jsonl')


def save_first_step(workdir, c):
  with open_directory(workdir, c) as run:
    run.save(1, {'x': np.zeros(1)}, None, 0)
  return (workdir / 'config.json').read_text()


def test_field_unknown_to_an_earlier_config_is_not_a_change(tmp_path):
  c = schema.defaults()
  old = json.loads(save_first_step(tmp_path, c))
  del old['model.attention']
  file = tmp_path / 'config.json'
  file.write_text(json.dumps(old))
  c.model.revision = 'a1b2'  # As paths.pin_model does.
  with open_directory(tmp_path, c, commit='a1b2') as run:
    assert run.changes == [] and changes(tmp_path) == []
  file.write_text(json.dumps(old))
  c.model.attention, c.model.revision = 'xla', 'other'
  with open_directory(tmp_path, c, commit='a1b2') as run:
    assert len(run.changes) == 2
  assert [row['changed'] for row in changes(tmp_path)] == [
    {'model.attention': ['auto', 'xla'], 'model.revision': ['', 'other']}
  ]


def test_kill_between_row_and_config_writes_a_change_once(tmp_path):
  c = schema.defaults()
  before = save_first_step(tmp_path, c)
  c.rollout.prompts = 16
  for _ in range(2):
    (tmp_path / 'config.json').write_text(before)
    with open_directory(tmp_path, c) as run:
      assert run.changes == ['rollout.prompts was 8 and is now 16']
  assert len(changes(tmp_path)) == 1


# --- Several processes; real ones are in test_pair.py ------------------------


def test_later_process_writes_nothing(tmp_path, monkeypatch):
  with open_directory(tmp_path) as run:
    run.metrics.append({'step': 1})
    before = contents(tmp_path)
    monkeypatch.setattr(processes, 'is_first', lambda: False)
    c = schema.defaults()
    c.rollout.prompts = 16
    with open_directory(tmp_path, c) as other:
      assert other.restore({'step': 0}) == (None, FIRST)
      other.metrics.append({'step': 2})
      other.evaluations.append({'step': 2})
      other.write('baselines.json', {})
      other.write_episodes(2, [{}])
    assert contents(tmp_path) == before and len(before) == 4


@pytest.mark.parametrize('newest', [-2, -1, 8, 12])
def test_is_seen_needs_the_mark_and_the_newest_checkpoint(
  tmp_path, monkeypatch, newest
):
  monkeypatch.setattr(directory, '_SEEN_WITHIN', -1.0)
  run = tmp_path / 'run'
  mark = run / '.mark'
  assert not directory._is_seen(mark, 'word', newest)
  run.mkdir()
  if newest > -2:
    (run / 'checkpoints').mkdir()
    (run / 'checkpoints' / '13.orbax-checkpoint-tmp').mkdir()
  if newest > -1:
    (run / 'checkpoints' / str(newest)).mkdir()
  assert not directory._is_seen(mark, 'word', newest)
  mark.write_text('another')
  assert not directory._is_seen(mark, 'word', newest)
  mark.write_text('word')
  assert directory._is_seen(mark, 'word', newest)
  assert not directory._is_seen(mark, 'word', newest + 1)


def test_is_seen_waits_for_what_appears_late(tmp_path, monkeypatch):
  mark = tmp_path / 'run' / '.mark'

  def sleep(seconds):
    (mark.parent / 'checkpoints' / '3').mkdir(parents=True)
    mark.write_text('word')

  monkeypatch.setattr(directory.time, 'sleep', sleep)
  assert directory._is_seen(mark, 'word', 3)


def test_check_shared_checkpoint_of_one_process_is_expected_by_all(
  tmp_path, monkeypatch
):
  """The listing of process 0 may be the old one."""
  expected = []

  def is_seen(mark, text, newest):
    expected.append(newest)
    return True

  def allgather(value):
    other = ('.theirs', 12) if isinstance(value, tuple) else value
    return [value, other]

  monkeypatch.setattr(processes, 'allgather', allgather)
  monkeypatch.setattr(directory, '_is_seen', is_seen)
  directory.check_shared(tmp_path)
  assert expected == [12]


@pytest.mark.parametrize('sees', [True, False])
def test_check_shared_removes_its_mark(tmp_path, monkeypatch, sees):
  run = tmp_path / 'run'
  marks = []

  def allgather(value):
    marks.extend(run.iterdir() if run.is_dir() else ())
    return [value, sees if isinstance(value, bool) else value]

  monkeypatch.setattr(processes, 'allgather', allgather)
  if sees:
    directory.check_shared(run)
  else:
    with pytest.raises(errors.UsageError, match='process 1 does not see'):
      directory.check_shared(run)
  assert marks and list(run.iterdir()) == []
