"""Where a run directory lies: on a disk, or in a Google Cloud Storage bucket.

`path` makes either from what the user typed. Both kinds have the methods of
`pathlib.Path`, with three differences that this file hides:

1. An object appears whole or not at all, so it is written in its place; a file
   is written beside its place and renamed.
2. An object cannot be appended to: who appends writes it anew (`metrics`).
3. There is no file lock. A lease takes its place: an object that its holder
   writes again every few seconds. Every write names the generation that it
   replaces, and the bucket refuses any other, so that of two processes one
   wins. A lease that nobody renews for a minute is free: a run that was killed
   is gone on with after that minute.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import socket
import threading
import time
import uuid

from actfocus_jax import errors

_BUCKET = 'gs://'
_FOLDER = re.compile(r'gs://[^/]+/+[^/]')
# An address: taken for a path, it is a folder whose name ends with a colon.
_SCHEME = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*:/')
# What epath, Orbax and the lease import for a bucket; one command brings both.
_PACKAGES = ('gcsfs', 'google.cloud.storage')
_INSTALL = 'pip install gcsfs'

LEASE_SECONDS = 60.0  # after which one that was not renewed is free
_RENEWALS = 6  # in that time
_SURE = 0.5  # of that time: so long after a renewal nobody else can write


# --- Paths -------------------------------------------------------------------


def path(text: str, flag: str = '--workdir') -> pathlib.Path:
  """The place that a user named.

  Args:
    text: A directory, or gs://BUCKET/FOLDER.
    flag: The name it was given by.

  Returns:
    A `pathlib.Path`, or for a bucket an `epath.Path`, which is used like one.

  Raises:
    UsageError: For a bucket, where a package is missing or no folder is named;
      for any other address.
  """
  if not _SCHEME.match(text):
    return pathlib.Path(text)
  if not _FOLDER.match(text):
    raise errors.UsageError(
      f'{flag} is {text}; allowed: a directory, or gs://BUCKET/FOLDER.'
    )
  if not all(map(_is_installed, _PACKAGES)):
    raise errors.UsageError(
      f'{flag} is {text}, which needs a package more: {_INSTALL}'
    )
  # Imported late: they are for buckets only.
  import fsspec
  from etils import epath

  # What is listed once would be answered so for ever, also that a file is not
  # there. The first path makes the file system of all.
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  return epath.Path(text)


def on_disk(text: str, flag: str) -> pathlib.Path:
  """The place that a user named for what is never in a bucket.

  Args:
    text: A directory.
    flag: The name it was given by.

  Returns:
    The path.

  Raises:
    UsageError: For any address.
  """
  if _SCHEME.match(text):
    raise errors.UsageError(
      f'{flag} is {text}; allowed: a directory on this machine.'
    )
  return pathlib.Path(text)


def is_remote(place: os.PathLike) -> bool:
  """Whether a path lies in a bucket."""
  return os.fspath(place).startswith(_BUCKET)


def check_bucket(place: pathlib.Path, flag: str = '--workdir'):
  """Refuses a bucket that cannot be used; does nothing for a disk.

  The objects of a folder are listed, as everything here needs, and the bucket
  itself is asked about, as Orbax does whenever it looks for checkpoints: a role
  for objects alone lacks that, and the run would fail at its first checkpoint.

  Args:
    place: From `path`.
    flag: The name it was given by.

  Raises:
    UsageError: One sentence.
  """
  if not is_remote(place):
    return
  from google.cloud import storage

  name, folder = _split(place)
  try:
    client = storage.Client()
    list(client.list_blobs(name, prefix=folder, max_results=1, timeout=30))
  except Exception as error:  # Of the network, the credentials, the bucket.
    told = ' '.join(str(error).split())
    raise errors.UsageError(
      f'{flag} is {place}, whose bucket cannot be reached: {told}'
    ) from error
  try:
    client.get_bucket(name, timeout=30)
  except Exception as error:
    told = ' '.join(str(error).split())
    raise errors.UsageError(
      f'{flag} is {place}, whose objects can be listed, but Orbax also needs '
      f'storage.buckets.get (role Storage Legacy Bucket Reader): {told}'
    ) from error


def write(place: pathlib.Path, text: str):
  """Writes a file, whole or not at all."""
  if is_remote(place):
    place.write_text(text)
    return
  partial = place.with_name(f'.{place.name}.partial')
  partial.write_text(text)
  os.replace(partial, place)


def _is_installed(name: str) -> bool:
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:  # Its parent is missing.
    return False


def _split(place: os.PathLike) -> tuple[str, str]:
  bucket, _, name = os.fspath(place).removeprefix(_BUCKET).partition('/')
  return bucket, name


# --- One process at a time ---------------------------------------------------


class Lease:
  """An object in a bucket that its holder keeps renewing.

  The generation of the object, a number that every write changes, is both the
  sign of life and the guard: no clocks are compared.
  """

  def __init__(self, place: pathlib.Path, seconds: float | None = None):
    """Takes the lease, after a wait where a dead process left one.

    Args:
      place: The object.
      seconds: How long an unrenewed lease counts; LEASE_SECONDS if None.

    Raises:
      UsageError: When its holder is alive, or another process was quicker.
    """
    from google.api_core import exceptions
    from google.cloud import storage

    self._place, self._seconds = place, seconds or LEASE_SECONDS
    self._refusal = exceptions.PreconditionFailed
    bucket, name = _split(place)
    self._bucket, self._name = storage.Client().bucket(bucket), name
    self._is_lost = False
    self._mine = f'{socket.gethostname()} {os.getpid()} {uuid.uuid4()}\n'
    left = self._generation_left()
    self._renewed = time.monotonic()
    self._generation = self._write(left)
    self._one_at_a_time, self._stop = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._keep, daemon=True)
    self._thread.start()

  def check(self):
    """Raises RunError when another process has taken the lease.

    Where it has not been renewed for a while it is now, before anything is
    written; what the network raises then goes through.
    """
    if time.monotonic() - self._renewed > _SURE * self._seconds:
      self._renew()
    if self._is_lost:
      raise errors.RunError(
        f'Another process has taken {self._place}, since this one could not '
        f'renew it for {self._seconds:g} seconds. Nothing more is written.'
      )

  def close(self):
    """Lets others in; where it cannot, they wait until the lease is free."""
    self._stop.set()
    self._thread.join()
    if self._is_lost:
      return
    try:
      blob = self._bucket.blob(self._name)
      blob.delete(if_generation_match=self._generation)
    except Exception as error:  # It must not hide how the run itself ended.
      told = ' '.join(str(error).split())
      print(
        f'{self._place} could not be removed and is free in '
        f'{self._seconds:g} seconds: {told}'
      )

  def _generation_left(self) -> int:
    """The generation of a lease that nobody renews; 0 where there is none."""
    first = last = self._seen()
    end = time.monotonic() + self._seconds
    if first:
      print(
        f'{self._place} is there: waiting {self._seconds:g} seconds to see '
        'whether its process is alive.'
      )
    while last and time.monotonic() < end:
      time.sleep(self._seconds / _RENEWALS)
      last = self._seen()
      if last not in (0, first):
        raise taken(self._place)
    return last

  def _seen(self) -> int:
    blob = self._bucket.get_blob(self._name)
    return blob.generation if blob else 0

  def _write(self, generation: int) -> int:
    """Replaces one generation; returns the next."""
    blob = self._bucket.blob(self._name)
    try:
      blob.upload_from_string(self._mine, if_generation_match=generation)
    except self._refusal as error:
      raise taken(self._place) from error
    return blob.generation

  def _keep(self):
    """Renews the lease until it is closed or lost; a thread of its own."""
    while not self._is_lost and not self._stop.wait(self._seconds / _RENEWALS):
      with contextlib.suppress(Exception):  # The network: tried again.
        self._renew()

  def _renew(self):
    """Renews the lease, or learns that another process has it."""
    with self._one_at_a_time:
      while not self._is_lost:
        begin = time.monotonic()
        try:
          self._generation = self._write(self._generation)
          self._renewed = begin
          return
        except errors.UsageError:
          # A write whose answer was lost is ours; who knows of when. So again.
          self._generation = self._generation_of_mine()
          self._is_lost = not self._generation

  def _generation_of_mine(self) -> int:
    """The generation of this lease in the bucket; 0 where it is another's."""
    blob = self._bucket.get_blob(self._name)
    if blob is None or blob.download_as_text() != self._mine:
      return 0
    return blob.generation


def taken(place: pathlib.Path) -> errors.UsageError:
  """The refusal of a run directory that another process holds."""
  return errors.UsageError(
    f'--workdir is {place.parent}, where another process is training.'
  )
