"""Checks of the directories that a command line names.

A directory of another run, an incomplete download of a model or a disk that
cannot be written to is refused with one sentence; nothing is written.
"""

import os
import pathlib
from typing import Any

import ml_collections

from actfocus_jax import errors
from actfocus_jax.config import resume
from actfocus_jax.model import files
from actfocus_jax.run import storage


def pin_model(model: ml_collections.ConfigDict, workdir: pathlib.Path):
  """Set an empty `model.revision` to the hub commit that a run started from."""
  commit = model_of_run(workdir).get('commit')
  if commit and files.is_hub_id(model.path) and not model.revision:
    with model.unlocked():
      model.revision = commit


def model_of_run(workdir: pathlib.Path) -> dict[str, Any]:
  """Read model.json of a run: path, commit, sha256; empty for a new run."""
  file = resume.model_file(workdir)
  return read_json(file) if file else {}


def check_model(
  model: ml_collections.ConfigDict, warm_start_cache: str
) -> pathlib.Path | None:
  """Return the model's directory, fetched from the hub; None: warm start.

  Raises:
    UsageError: one sentence that names the path and what is missing.
  """
  path = model.path
  if not path:
    cache = storage.on_disk(warm_start_cache, 'warm_start.cache')
    if not cache.is_dir():
      check_writable('warm_start.cache', cache)
    return None
  try:
    directory = files.locate(path, model.revision)
  except ValueError as error:
    raise errors.UsageError(str(error)) from error
  try:
    files.check(directory)
  except ValueError as error:
    hint = ''
    if files.is_hub_id(path):
      hint = f' {files.how_to_fetch(path, model.revision)}'
    raise errors.UsageError(f'model.path is {path!r}: {error}{hint}') from error
  return directory


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Read a JSON object; refuse a file that does not hold one."""
  try:
    return files.read_json(file)
  except ValueError as error:
    raise errors.UsageError(str(error)) from error


def check_workdir(
  workdir: pathlib.Path, config: dict[str, Any], *, same_batch: bool = False
):
  """Raise UsageError for a directory of another run or of something else.

  `same_batch` refuses another batch size too; see `resume.difference`.
  """
  storage.check_bucket(workdir)
  if workdir.exists() and not workdir.is_dir():
    raise errors.UsageError(f'--workdir is {workdir}, which is a file.')
  if not workdir.exists():
    if not storage.is_remote(workdir):
      check_writable('--workdir', workdir)
    return
  # A start that was killed before it wrote the config leaves these.
  names = {file.name for file in workdir.iterdir()} - {resume.MODEL}
  if all(name.startswith('.') for name in names):
    return
  snapshot = workdir / resume.CONFIG
  if not snapshot.exists():
    raise errors.UsageError(
      f'--workdir is {workdir}, which holds files but not a run; allowed: a '
      'new or empty directory, or that of a run to go on with.'
    )
  change = resume.difference(read_json(snapshot), config, same_batch=same_batch)
  if change:
    raise errors.UsageError(
      f'--workdir is {workdir}, whose run had another config: {change}; '
      'allowed: the same config, or another workdir.'
    )


def check_new(flag: str, directory: pathlib.Path):
  """Refuse a directory that is not empty, or cannot be made."""
  if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
    raise errors.UsageError(
      f'{flag} is {directory}, which exists already; name a new directory.'
    )
  check_writable(flag, directory)


def check_file(flag: str, file: pathlib.Path):
  """Refuse a path that cannot be written as a file."""
  if file.is_dir():
    raise errors.UsageError(
      f'{flag} is {file}, which is a directory; allowed: a file.'
    )
  if not file.exists():
    check_writable(flag, file)
  elif not os.access(file, os.W_OK):
    raise errors.UsageError(f'{flag} is {file}, which cannot be written to.')


def check_writable(flag: str, path: pathlib.Path):
  """Refuse a directory that cannot be written to, or cannot be made."""
  parent = path.absolute()
  while not parent.exists():
    parent = parent.parent
  if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
    what = 'used' if path.exists() else 'made'
    raise errors.UsageError(
      f'{flag} is {path}, which cannot be {what}: {parent} is not a directory '
      'that can be written to.'
    )
