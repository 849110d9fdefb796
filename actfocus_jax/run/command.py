"""The command line shared by train, evaluate and warm_start.

Mistakes are told in one sentence on stderr with exit code 2, before jax is
imported and before anything is written.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from actfocus_jax.run import checks, settings

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
    Refused: One sentence.
  """
  c = CONFIG.value
  if c is None:
    raise settings.Refused(
      '--config is missing; e.g. --config=configs/quickstart.py'
    )
  checks.check(c)
  check_model_directory(c.model.path)
  return c


def check_model_directory(path: str):
  """Refuses a `model.path` that is no readable Qwen2 directory.

  Args:
    path: `model.path`; '' stands for the warm start.

  Raises:
    Refused: One sentence naming the path and what is missing.
  """
  if not path:
    return
  directory = pathlib.Path(path)
  needed = 'config.json, tokenizer.json and *.safetensors'
  if not directory.is_dir():
    raise settings.Refused(
      f'model.path is {path!r}, which is no directory; allowed: a Hugging Face '
      f'model directory with {needed}.'
    )
  for pattern in ('config.json', 'tokenizer.json', '*.safetensors'):
    if not any(directory.glob(pattern)):
      raise settings.Refused(
        f'model.path is {path!r}, which lacks {pattern}; allowed: a Hugging '
        f'Face model directory with {needed}.'
      )
  kind = _read_json(directory / 'config.json').get('model_type')
  if kind != 'qwen2':
    raise settings.Refused(
      f'model.path is {path!r}, whose config.json has model_type {kind!r}; '
      "allowed: 'qwen2'."
    )
  _read_json(directory / 'tokenizer.json')
  for file in directory.glob('*.safetensors'):
    _check_header(file)


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  """A JSON object from a file that a user named; refused when it is none."""
  try:
    content = json.loads(file.read_text())
  except (ValueError, OSError) as error:
    raise settings.Refused(f'{file} cannot be read: {error}.') from error
  if not isinstance(content, dict):
    raise settings.Refused(f'{file} cannot be read: it holds no JSON object.')
  return content


def _check_header(file: pathlib.Path):
  """Refuses a file that only has the name of a safetensors file.

  Such a file begins with the length of a JSON header, in 8 bytes. A download
  that failed often leaves a small text in its place.
  """
  with file.open('rb') as stream:
    length = int.from_bytes(stream.read(8), 'little')
    rest = file.stat().st_size - 8
    if not 2 <= length <= rest or stream.read(1) != b'{':
      raise settings.Refused(
        f'{file} cannot be read: it is no safetensors file of '
        f'{rest + 8} bytes; was the download whole?'
      )


def check_workdir(workdir: pathlib.Path, c: ml_collections.ConfigDict):
  """Refuses a directory that belongs to something else.

  Args:
    workdir: Where the run lives or will live.
    c: The config.

  Raises:
    Refused: One sentence.
  """
  if workdir.exists() and not workdir.is_dir():
    raise settings.Refused(f'--workdir is {workdir}, which is a file.')
  if not workdir.exists():
    return
  # Dot-files are ours: a start that was killed may have left them alone.
  if all(file.name.startswith('.') for file in workdir.iterdir()):
    return
  snapshot = workdir / 'config.json'
  if not snapshot.exists():
    raise settings.Refused(
      f'--workdir is {workdir}, which holds files but no run; allowed: a new '
      'or empty directory, or that of a run to go on with.'
    )
  change = settings.difference(_read_json(snapshot), c)
  if change:
    raise settings.Refused(
      f'--workdir is {workdir}, whose run had another config: {change}; '
      'allowed: the same config, or another workdir.'
    )


@contextlib.contextmanager
def refusing() -> Iterator[None]:
  """Turns `Refused` into one sentence on stderr and exit code 2.

  Any other exception is a defect or a failure of the machine and keeps its
  traceback.
  """
  try:
    yield
  except settings.Refused as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
  """Parses with absl; every way to fail becomes one sentence."""
  for path in _config_files(argv):
    if not pathlib.Path(path).is_file():
      raise settings.Refused(f'--config is {path!r}, which is no file.')
  try:
    rest = flags.FLAGS(argv)
  except (
    flags.Error,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    OSError,
  ) as error:
    raise settings.Refused(_sentence(error, argv)) from error
  if len(rest) > 1:
    raise settings.Refused(f'unexpected argument {rest[1]!r}')
  return rest


def _config_files(argv: list[str]) -> list[str]:
  """What follows `--config`, behind `=` or as the next argument."""
  files = [b for a, b in itertools.pairwise(argv) if a == '--config']
  begin = '--config='
  files += [a.removeprefix(begin) for a in argv if a.startswith(begin)]
  return [file.partition(':')[0] for file in files]


def _sentence(error: Exception, argv: list[str]) -> str:
  """What went wrong, without the traceback that ml_collections includes."""
  text = ' '.join(str(error).split())
  if isinstance(error, (AttributeError, KeyError, flags.UnrecognizedFlagError)):
    schemas = [
      settings.flatten(settings.defaults(env)) for env in settings.ENV_OPTIONS
    ]
    common = set(schemas[0]).intersection(*schemas[1:])
    named = (_field(a) for a in argv if a.startswith('--config.'))
    field = next((name for name in named if name not in common), None)
    if field is not None:
      return settings.unknown_field(field, sorted(common))
  return re.split(r'\b(?:\w+Error|Refused): ', text)[-1]


def _field(argument: str) -> str:
  return argument.removeprefix('--config.').partition('=')[0]
