"""The run directory of several processes: one writes, all must see it."""

import pathlib
import time
import uuid
from typing import Any

from actfocus_jax import errors
from actfocus_jax.parallel import processes
from actfocus_jax.run import directory, storage

# Seconds in which a shared directory must show what another process wrote.
_SEEN_WITHIN = 40.0


def open_run(
  workdir: pathlib.Path, config: dict[str, Any], model: dict[str, str]
) -> directory.RunDirectory:
  """Opens the run directory in every process; the first one writes.

  Args:
    workdir: run directory.
    config: values by dotted field name, as of `schema.to_json`.
    model: As of RunDirectory, the same in all processes.

  Returns:
    The run directory.

  Raises:
    UsageError: In all processes: as of RunDirectory, or when they do not all
      see the directory.
  """
  if processes.count() > 1:
    check_shared(workdir)
  opened = None
  try:
    with processes.raise_everywhere():
      opened = directory.RunDirectory(
        workdir,
        config,
        model,
        writes=processes.is_first(),
        on_failure=processes.abort,
      )
  except errors.UsageError:
    if opened is not None:  # Another was refused; this one lets go.
      opened.let_go()
    raise
  return opened


def check_shared(workdir: pathlib.Path):
  """Refuses a directory that not all processes see, before they wait in it.

  The first writes a file of a name that nobody else has, so it asks for no
  lease: it disturbs no run that holds one, and no other that is looking.

  Args:
    workdir: Made if need be.

  Raises:
    UsageError: One sentence, in all processes.
  """
  told = processes.allgather(
    (f'.processes-{uuid.uuid4().hex}', _newest(workdir))
  )
  name, newest = told[0][0], max(newest for _, newest in told)
  mark = workdir / name
  try:
    if processes.is_first():
      workdir.mkdir(parents=True, exist_ok=True)
      storage.write(mark, name)
    processes.allgather(None)  # It is written.
    seen = processes.allgather(_is_seen(mark, name, newest))
  finally:
    if processes.is_first():
      mark.unlink(missing_ok=True)
  if not all(seen):
    raise errors.UsageError(
      f'--workdir is {workdir}, of which process {seen.index(False)} does not '
      'see what another process writes there; allowed: a directory that all '
      'processes share, or gs://BUCKET/FOLDER.'
    )


def _newest(workdir: pathlib.Path) -> int:
  """The newest checkpoint that is seen; -1: none, -2: not even a folder.

  Processes meet where they open that folder, so all must see it or none; and
  all read the newest one.
  """
  folder = workdir / 'checkpoints'
  if not folder.is_dir():
    return -2
  steps = (file.name for file in folder.iterdir())
  return max((int(name) for name in steps if name.isdigit()), default=-1)


def _is_seen(mark: pathlib.Path, word: str, newest: int) -> bool:
  """Looks for a while, as a network's file system needs."""
  end = time.monotonic() + _SEEN_WITHIN
  while not (
    mark.exists()
    and mark.read_text() == word
    and _newest(mark.parent) >= newest
  ):
    if time.monotonic() > end:
      return False
    for folder in (mark.parent.parent, mark.parent):
      if folder.exists():
        list(folder.iterdir())  # Asks such a system anew.
    time.sleep(1.0)
  return True
