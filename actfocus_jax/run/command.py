"""The command line shared by train, evaluate and warm_start.

Mistakes are told in one sentence on stderr with exit code 2, before jax is
imported and before anything is written.
"""

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from actfocus_jax.run import settings

CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'configs/NAME.py[:key=value,...]; single fields by --config.section.field=x',
  lock_config=True,
)


def run(main: Callable[[list[str]], None]):
  """Parses the flags and calls `main`; a bad flag exits with code 2."""
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  logging.set_verbosity(logging.WARNING)  # Orbax tells of every rename.
  with refusing():
    app.run(main, flags_parser=_parse)


def config() -> ml_collections.ConfigDict:
  """The checked config.

  Raises:
    ValueError: One sentence.
  """
  c = CONFIG.value
  if c is None:
    raise ValueError('--config is missing; e.g. --config=configs/quickstart.py')
  settings.check(c)
  check_model_directory(c.model.path)
  return c


def check_model_directory(path: str):
  """Refuses a `model.path` that is no readable Qwen2 directory.

  Args:
    path: `model.path`; '' stands for the warm start.

  Raises:
    ValueError: One sentence naming the path and what is missing.
  """
  if not path:
    return
  directory = pathlib.Path(path)
  needed = 'config.json, tokenizer.json and *.safetensors'
  if not directory.is_dir():
    raise ValueError(
      f'model.path is {path!r}, which is no directory; allowed: a Hugging Face '
      f'model directory with {needed}.'
    )
  for pattern in ('config.json', 'tokenizer.json', '*.safetensors'):
    if not any(directory.glob(pattern)):
      raise ValueError(
        f'model.path is {path!r}, which lacks {pattern}; allowed: a Hugging '
        f'Face model directory with {needed}.'
      )
  try:
    kind = json.loads((directory / 'config.json').read_text()).get('model_type')
  except (ValueError, AttributeError) as error:
    raise ValueError(
      f'model.path is {path!r}, whose config.json cannot be read ({error}).'
    ) from error
  if kind != 'qwen2':
    raise ValueError(
      f'model.path is {path!r}, whose config.json has model_type {kind!r}; '
      "allowed: 'qwen2'."
    )


def check_workdir(workdir: pathlib.Path, c: ml_collections.ConfigDict):
  """Refuses a directory that belongs to something else.

  Args:
    workdir: Where the run lives or will live.
    c: The config.

  Raises:
    ValueError: One sentence.
  """
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f'--workdir is {workdir}, which is a file.')
  if not workdir.exists() or not any(workdir.iterdir()):
    return
  snapshot = workdir / 'config.json'
  if not snapshot.exists():
    raise ValueError(
      f'--workdir is {workdir}, which holds files but no run; allowed: a new '
      'or empty directory, or that of a run to go on with.'
    )
  change = settings.difference(json.loads(snapshot.read_text()), c)
  if change:
    raise ValueError(
      f'--workdir is {workdir}, whose run had another config: {change}; '
      'allowed: the same config, or another workdir.'
    )


@contextlib.contextmanager
def refusing() -> Iterator[None]:
  """Turns a ValueError into one sentence on stderr and exit code 2."""
  try:
    yield
  except ValueError as error:
    sys.exit(refuse(str(error)))


def refuse(sentence: str) -> int:
  """Prints the sentence; returns the exit code of refused input."""
  print(f'error: {sentence}', file=sys.stderr)
  return 2


def _parse(argv: list[str]) -> list[str]:
  """Parses with absl; every way to fail becomes one sentence."""
  for argument in argv:
    if argument.startswith('--config='):
      path = argument.removeprefix('--config=').partition(':')[0]
      if not pathlib.Path(path).is_file():
        raise ValueError(f'--config is {path!r}, which is no file.')
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
    raise ValueError(_sentence(error, argv)) from error
  if len(rest) > 1:
    raise ValueError(f'unexpected argument {rest[1]!r}')
  return rest


def _sentence(error: Exception, argv: list[str]) -> str:
  """What went wrong, without the traceback that ml_collections includes."""
  if isinstance(error, (AttributeError, KeyError)):
    return _unknown_field(argv)
  text = ' '.join(str(error).split())
  return text.rpartition('ValueError: ')[2]


def _unknown_field(argv: list[str]) -> str:
  known = settings.flatten(settings.defaults())
  named = [_field(a) for a in argv if a.startswith('--config.')]
  field = next((n for n in named if n not in known), 'A --config. flag')
  near = settings.nearest(settings.defaults(), field)
  hint = f'; did you mean {" or ".join(near)}?' if near else '.'
  return f'{field} is no field of the config{hint}'


def _field(argument: str) -> str:
  return argument.removeprefix('--config.').partition('=')[0]
