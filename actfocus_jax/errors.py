"""User-facing errors: a command ends with one sentence."""

import os


class UsageError(ValueError):
  """Bad input: one sentence and exit code 2, before anything is written."""


class RunError(RuntimeError):
  """A run that cannot go on: one sentence and exit code 1."""


class NoLearningSignal(RunError):
  """No group had spread for too many steps; the run has been saved."""


class Stopped(Exception):
  """A signal ended a command before its work was done.

  Attributes:
    code: exit code, 130 after SIGINT and 143 after SIGTERM.
  """

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.code = code


def sentence(error: BaseException) -> str | None:
  """Sentence about an error of the user or the machine; None for a defect.

  Args:
    error: `UsageError`, or the error that jax raises for a platform in
      JAX_PLATFORMS that is not there.
  """
  if isinstance(error, UsageError):
    return str(error)
  platform = os.environ.get('JAX_PLATFORMS')
  if not platform or not _has_no_device(error):
    return None
  why = ' '.join(str(error).split()).partition(' (set JAX_PLATFORMS')[0]
  return (
    f'JAX_PLATFORMS is {platform!r}, for which jax finds no device'
    f'{f" ({why})" if why else ""}; allowed: one that it is installed for '
    '(launch/environment.sh, with ACCELERATOR=tpu, say), or nothing.'
  )


def _has_no_device(error: BaseException) -> bool:
  """Return whether jax raised it while looking for devices."""
  if isinstance(error, RuntimeError):
    return 'nable to initialize backend' in str(error)
  # For CUDA without a GPU it is an AssertionError without a message.
  frame = error.__traceback__
  while frame is not None and frame.tb_next is not None:
    frame = frame.tb_next
  return (
    isinstance(error, AssertionError)
    and frame is not None
    and frame.tb_frame.f_globals.get('__name__') == 'jax._src.xla_bridge'
  )
