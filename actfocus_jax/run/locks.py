"""One process at a time: a file lock on a disk, a lease in a bucket.

A bucket has no file locks. A lease is an object that its holder writes again
every few seconds. Each write names the generation that it replaces, and the
bucket refuses any other, so of two processes exactly one wins. A lease that was
not renewed for a minute is free: a killed run can be resumed after that minute.
"""

import contextlib
import fcntl
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import IO

from actfocus_jax import errors
from actfocus_jax.run import storage

LEASE_SECONDS = 60.0  # A lease that was not renewed for so long is free.
_RENEWALS = 6  # per LEASE_SECONDS
# Share of LEASE_SECONDS after a renewal in which no other process can write.
_SAFE_SHARE = 0.5


def lock_file(path: pathlib.Path, *, wait: bool = False) -> IO[str]:
  """Take a file lock, which `close` or the end of the process releases.

  Raises:
    UsageError: another process holds the lock and `wait` is False.
  """
  file = path.open('w')
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError as error:
    file.close()
    raise _taken(path) from error
  return file


class Lease:
  """Object in a bucket that its holder keeps renewing.

  The generation of the object, a number that every write changes, is both the
  sign of life and the guard. No clocks are compared.
  """

  def __init__(self, path: pathlib.Path, seconds: float = LEASE_SECONDS):
    """Take the lease; wait first if a dead process may have left one.

    Raises:
      UsageError: its holder is alive, or another process took it first.
    """
    from google.api_core import exceptions
    from google.cloud import storage as google_storage

    self._path, self._seconds = path, seconds
    self._refusal = exceptions.PreconditionFailed
    bucket, self._name = storage.split(path)
    self._bucket = google_storage.Client().bucket(bucket)
    self._is_lost = False
    self._text = f'{socket.gethostname()} {os.getpid()} {uuid.uuid4()}\n'
    abandoned = self._abandoned_generation()
    self._renewed = time.monotonic()
    self._generation = self._write(abandoned)
    self._renewing, self._stop = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._keep, daemon=True)
    self._thread.start()

  def check(self):
    """Raise RunError if another process has taken the lease.

    A lease that was not renewed for a while is renewed before anything is
    written; errors of the network pass through.
    """
    if time.monotonic() - self._renewed > _SAFE_SHARE * self._seconds:
      self._renew()
    if self._is_lost:
      raise errors.RunError(
        f'Another process has taken {self._path}, since this one could not '
        f'renew it for {self._seconds:g} seconds. Nothing more is written.'
      )

  def close(self):
    """Release the lease; if that fails, it expires by itself."""
    self._stop.set()
    self._thread.join()
    if self._is_lost:
      return
    try:
      blob = self._bucket.blob(self._name)
      blob.delete(if_generation_match=self._generation)
    except Exception as error:  # It must not hide how the run itself ended.
      reason = ' '.join(str(error).split())
      print(
        f'{self._path} could not be removed and is free in '
        f'{self._seconds:g} seconds: {reason}'
      )

  def _abandoned_generation(self) -> int:
    """Generation of a lease that nobody renews; 0 without a lease."""
    first = last = self._current_generation()
    end = time.monotonic() + self._seconds
    if first:
      print(
        f'{self._path} is there: waiting {self._seconds:g} seconds to see '
        'whether its process is alive.'
      )
    while last and time.monotonic() < end:
      time.sleep(self._seconds / _RENEWALS)
      last = self._current_generation()
      if last not in (0, first):
        raise _taken(self._path)
    return last

  def _current_generation(self) -> int:
    blob = self._bucket.get_blob(self._name)
    return blob.generation if blob else 0

  def _write(self, generation: int) -> int:
    """Replace one generation; return the next."""
    blob = self._bucket.blob(self._name)
    try:
      blob.upload_from_string(self._text, if_generation_match=generation)
    except self._refusal as error:
      raise _taken(self._path) from error
    return blob.generation

  def _keep(self):
    """Renew the lease until it is closed or lost, in a thread of its own."""
    while not self._is_lost and not self._stop.wait(self._seconds / _RENEWALS):
      with contextlib.suppress(Exception):  # Network: tried again.
        self._renew()

  def _renew(self):
    """Renew the lease, or find that another process has it."""
    with self._renewing:
      while not self._is_lost:
        begin = time.monotonic()
        try:
          self._generation = self._write(self._generation)
          self._renewed = begin
          return
        except errors.UsageError:
          # An earlier write of this process may have arrived although its
          # answer was lost. Its time is unknown, so write once more.
          self._generation = self._own_generation()
          self._is_lost = not self._generation

  def _own_generation(self) -> int:
    """Generation of this lease in the bucket; 0 if another process has it."""
    blob = self._bucket.get_blob(self._name)
    if blob is None or blob.download_as_text() != self._text:
      return 0
    return blob.generation


def _taken(path: pathlib.Path) -> errors.UsageError:
  return errors.UsageError(
    f'--workdir is {path.parent}, where another process is training.'
  )
