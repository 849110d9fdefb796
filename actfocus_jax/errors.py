"""The two ways in which a command ends with one sentence."""

import os


class UsageError(ValueError):
  """Bad input: told in one sentence, with exit code 2, before any work."""


class RunError(RuntimeError):
  """A run that cannot go on: told in one sentence, with exit code 1."""


class NoLearningSignal(RunError):
  """A run that has nothing left to learn from; all of it is saved."""


def sentence(error: BaseException) -> str | None:
  """What to tell of an error that is no defect; None for any other.

  Args:
    error: `UsageError`, or what jax raises for a platform that the environment
      names and it does not have.
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
  """Whether jax raised it when it looked for devices."""
  if isinstance(error, RuntimeError):
    return 'nable to initialize backend' in str(error)
  # For CUDA without a GPU it is an assertion without a word.
  at = error.__traceback__
  while at is not None and at.tb_next is not None:
    at = at.tb_next
  return (
    isinstance(error, AssertionError)
    and at is not None
    and at.tb_frame.f_globals.get('__name__') == 'jax._src.xla_bridge'
  )
