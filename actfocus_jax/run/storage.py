"""Paths on a disk or in a Google Cloud Storage bucket.

`path` turns the user's text into either. Both kinds have the methods of
`pathlib.Path`. Three differences remain:

1. An object appears whole or not at all, so it is written in its place. A file
   is written beside its place and renamed (`write`).
2. An object cannot be appended to, so all its lines are written again
   (`metrics`).
3. A bucket has no file locks, but leases (`locks`).
"""

import importlib.util
import os
import pathlib
import re

from actfocus_jax import errors

_BUCKET = 'gs://'
_FOLDER = re.compile(r'gs://[^/]+/+[^/]')
# An address; as a path it would be a folder whose name ends with a colon.
_SCHEME = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*:/')
# epath, Orbax and the lease import these for a bucket; one command installs
# both.
_PACKAGES = ('gcsfs', 'google.cloud.storage')
_INSTALL = 'pip install gcsfs'


def path(text: str, flag: str = '--workdir') -> pathlib.Path:
  """Return the path that a flag names: a directory or gs://BUCKET/FOLDER.

  For a bucket it is an `epath.Path`, which has the methods of `pathlib.Path`.

  Raises:
    UsageError: a bucket without a folder, a missing package, or any other
      address.
  """
  if not _SCHEME.match(text):
    return pathlib.Path(text)
  if not _FOLDER.match(text):
    raise errors.UsageError(
      f'{flag} is {text}; allowed: a directory, or gs://BUCKET/FOLDER.'
    )
  if not all(map(_is_installed, _PACKAGES)):
    raise errors.UsageError(
      f'{flag} is {text}, which needs one more package: {_INSTALL}'
    )
  # Imported late: only buckets need them.
  import fsspec
  from etils import epath

  # A listing would be cached for ever, even that a file is absent. The first
  # path creates the file system of all, so this is set before.
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  return epath.Path(text)


def on_disk(text: str, flag: str) -> pathlib.Path:
  """Return the path that a flag names; raise UsageError for an address."""
  if _SCHEME.match(text):
    raise errors.UsageError(
      f'{flag} is {text}; allowed: a directory on this machine.'
    )
  return pathlib.Path(text)


def is_remote(path: os.PathLike) -> bool:
  """Return whether a path lies in a bucket."""
  return os.fspath(path).startswith(_BUCKET)


def split(path: os.PathLike) -> tuple[str, str]:
  """Return the bucket of a path and the name inside of it."""
  bucket, _, name = os.fspath(path).removeprefix(_BUCKET).partition('/')
  return bucket, name


def check_bucket(path: pathlib.Path, flag: str = '--workdir'):
  """Refuse a bucket that cannot be used; do nothing for a disk.

  Listing objects is needed everywhere here. Orbax also reads the bucket itself
  whenever it looks for checkpoints. A role for objects alone lacks that
  permission, and the run would fail at its first checkpoint.

  Raises:
    UsageError: the bucket cannot be reached, or a permission is missing.
  """
  if not is_remote(path):
    return
  from google.cloud import storage

  bucket, folder = split(path)
  try:
    client = storage.Client()
    list(client.list_blobs(bucket, prefix=folder, max_results=1, timeout=30))
  except Exception as error:  # Network, credentials, or no such bucket.
    reason = ' '.join(str(error).split())
    raise errors.UsageError(
      f'{flag} is {path}, whose bucket cannot be reached: {reason}'
    ) from error
  try:
    client.get_bucket(bucket, timeout=30)
  except Exception as error:
    reason = ' '.join(str(error).split())
    raise errors.UsageError(
      f'{flag} is {path}, whose objects can be listed, but Orbax also needs '
      f'storage.buckets.get (role Storage Legacy Bucket Reader): {reason}'
    ) from error


def write(path: pathlib.Path, text: str):
  """Write a file, whole or not at all."""
  if is_remote(path):
    path.write_text(text)
    return
  partial = path.with_name(f'.{path.name}.partial')
  partial.write_text(text)
  os.replace(partial, path)


def _is_installed(name: str) -> bool:
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:  # The parent package is missing.
    return False
