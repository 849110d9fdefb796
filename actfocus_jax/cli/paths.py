"""The directories that a command line names, looked at before jax is imported.

What is wrong with one is told in a sentence, and nothing is written: a run that
is another's, a model that is half a download, a disk that cannot be written to.
"""

import os
import pathlib
from typing import Any

import ml_collections

from actfocus_jax import errors
from actfocus_jax.config import resume, schema
from actfocus_jax.model import files
from actfocus_jax.parallel import mesh_shapes
from actfocus_jax.run import storage


def run_config(
  workdir: pathlib.Path, model_path: str | None
) -> ml_collections.ConfigDict:
  """The config that a run was started with.

  Args:
    workdir: Of the run.
    model_path: Where the model of the run lies now; None for where it lay.

  Returns:
    The config, with the place of the very model that the run started from.

  Raises:
    UsageError: When there is no run, or its model is gone.
  """
  storage.check_bucket(workdir)
  snapshot = workdir / resume.CONFIG
  if not snapshot.exists():
    raise errors.UsageError(f'--workdir is {workdir}, which holds no run.')
  try:
    c = schema.from_json(read_json(snapshot))
  except errors.UsageError as error:
    raise errors.UsageError(
      f'--workdir is {workdir}, which holds no run of this version: {error}'
    ) from error
  with c.unlocked():  # It may be looked at on another machine.
    c.model.attention = 'auto'
    if model_path:
      c.model.path, c.model.revision = model_path, ''
      return c
  pin_model(c, workdir)
  noted = _noted_model(workdir)
  if noted and not c.model.path:
    if not pathlib.Path(noted['path']).is_dir():
      raise errors.UsageError(
        f'--workdir is {workdir}, whose run started from {noted["path"]}, '
        'which is gone; name its new place by --model_path, or let the '
        'training command of the run make it again.'
      )
    with c.unlocked():
      c.model.path = noted['path']
  return c


def pin_model(c: ml_collections.ConfigDict, workdir: pathlib.Path):
  """Stays with the commit of the hub that a run in `workdir` started from.

  Args:
    c: The config; its `model.revision` is set unless it names one itself.
    workdir: Of a run, or new.
  """
  commit = _noted_model(workdir).get('commit')
  if commit and files.is_hub_id(c.model.path) and not c.model.revision:
    with c.unlocked():
      c.model.revision = commit


def _noted_model(workdir: pathlib.Path) -> dict[str, Any]:
  file = resume.model_file(workdir)
  return read_json(file) if file else {}


def check_model(c: ml_collections.ConfigDict) -> pathlib.Path | None:
  """Refuses a model that cannot be trained; one on the hub is fetched first.

  Args:
    c: The config.

  Returns:
    The model's directory; None for the small model of `warm_start`.

  Raises:
    UsageError: One sentence naming the path and what is missing.
  """
  path = c.model.path
  if not path:
    cache = storage.on_disk(c.warm_start.cache, 'warm_start.cache')
    if not cache.is_dir():
      check_writable('warm_start.cache', cache)
    return None
  try:
    directory = files.locate(path, c.model.revision)
  except ValueError as error:
    raise errors.UsageError(str(error)) from error
  try:
    config = files.check(directory)
  except ValueError as error:
    hint = ''
    if files.is_hub_id(path):
      hint = f' {files.how_to_fetch(path, c.model.revision)}'
    raise errors.UsageError(f'model.path is {path!r}: {error}{hint}') from error
  try:
    mesh_shapes.check(c.mesh, config.splits)
  except ValueError as error:
    raise errors.UsageError(str(error)) from error
  return directory


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """A JSON object from a file that a user named; refused when it is none."""
  try:
    return files.read_json(file)
  except ValueError as error:
    raise errors.UsageError(str(error)) from error


def check_new(flag: str, directory: pathlib.Path):
  """Refuses a directory that is there already, or cannot be made.

  Args:
    flag: The name it was given by.
    directory: To be written.

  Raises:
    UsageError: One sentence.
  """
  if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
    raise errors.UsageError(
      f'{flag} is {directory}, which is there already; name a new directory.'
    )
  check_writable(flag, directory)


def check_workdir(
  workdir: pathlib.Path,
  c: ml_collections.ConfigDict,
  *,
  same_batch: bool = False,
):
  """Refuses a directory that belongs to something else.

  Args:
    workdir: Where the run lives or will live.
    c: The config.
    same_batch: As of `resume.difference`.

  Raises:
    UsageError: One sentence.
  """
  storage.check_bucket(workdir)
  if workdir.exists() and not workdir.is_dir():
    raise errors.UsageError(f'--workdir is {workdir}, which is a file.')
  if not workdir.exists():
    if not storage.is_remote(workdir):
      check_writable('--workdir', workdir)
    return
  # Ours: what a start leaves that is killed before it has written the config.
  names = {file.name for file in workdir.iterdir()} - {resume.MODEL}
  if all(name.startswith('.') for name in names):
    return
  snapshot = workdir / resume.CONFIG
  if not snapshot.exists():
    raise errors.UsageError(
      f'--workdir is {workdir}, which holds files but no run; allowed: a new '
      'or empty directory, or that of a run to go on with.'
    )
  old = read_json(snapshot)
  change = resume.difference(old, c, same_batch=same_batch)
  if change:
    raise errors.UsageError(
      f'--workdir is {workdir}, whose run had another config: {change}; '
      'allowed: the same config, or another workdir.'
    )


def check_file(flag: str, file: pathlib.Path):
  """Refuses what cannot be written as a file.

  Args:
    flag: The name it was given by.
    file: To be written, anew or again.

  Raises:
    UsageError: One sentence.
  """
  if file.is_dir():
    raise errors.UsageError(
      f'{flag} is {file}, which is a directory; allowed: a file.'
    )
  if not file.exists():
    check_writable(flag, file)
  elif not os.access(file, os.W_OK):
    raise errors.UsageError(f'{flag} is {file}, which cannot be written to.')


def check_writable(flag: str, path: pathlib.Path):
  """Refuses a directory that cannot be written to, or cannot be made.

  Args:
    flag: The name it was given by.
    path: Of the directory, which need not be there.

  Raises:
    UsageError: One sentence.
  """
  there = path.absolute()
  while not there.exists():
    there = there.parent
  if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
    what = 'used' if path.exists() else 'made'
    raise errors.UsageError(
      f'{flag} is {path}, which cannot be {what}: {there} is no directory that '
      'can be written to.'
    )
