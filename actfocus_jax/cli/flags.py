"""The command line that the commands share: flags, the config, refusals.

Bad input ends a command with one sentence on stderr and exit code 2, before
anything is written.
"""

import contextlib
import importlib.util
import itertools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from actfocus_jax import errors
from actfocus_jax.cli import paths
from actfocus_jax.config import resume, schema, validate
from actfocus_jax.run import storage

CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'configs/NAME.py[:key=value,...] with the keys size, algo, weights and '
  'estimator; single fields by --config.section.field=x.',
  lock_config=True,
)
MODEL_PATH = flags.DEFINE_string(
  'model_path',
  None,
  'New place of the model that the run of --workdir started from.',
)
_HELP = '--help_config'
flags.DEFINE_string(
  _HELP.removeprefix('--'),
  None,
  'Print every field of the config, or of one SECTION, and stop: default, '
  'allowed values and meaning.',
)


def run(main: Callable[[list[str]], None], changes: str = ''):
  """Parse the flags and call `main` with the remaining arguments.

  `changes` is the flag, if any, that names the config of `overridden`.

  Raises:
    SystemExit: code 2 for bad input, 1 for a run that cannot go on, 130 or 143
      after a signal.
  """
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  logging.set_verbosity(logging.ERROR)  # Orbax logs every rename.
  try:
    with refusing():
      app.run(main, flags_parser=lambda argv: _parse(argv, changes))
  except errors.Stopped as stopped:
    print(stopped)
    sys.exit(stopped.code)
  except errors.RunError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(1)


def config() -> ml_collections.ConfigDict:
  """Return the config of the command line, checked."""
  c = CONFIG.value
  if c is None:
    raise errors.UsageError(
      '--config is missing; e.g. --config=configs/quickstart.py'
    )
  if MODEL_PATH.value:
    raise errors.UsageError(
      '--model_path goes with the run of --workdir, not with --config; '
      'allowed there: --config.model.path=DIR.'
    )
  validate.check(c)
  return c


def overrides() -> dict[str, Any]:
  """Fields that `--config.section.field=value` sets on this command line."""
  return config_flags.get_override_values(flags.FLAGS['config'])


def config_with(arguments: str) -> ml_collections.ConfigDict:
  """Return the config with more arguments, `key=value,...`, checked.

  Overridden fields stay overridden, unless the algorithm or the estimator does
  not have them.
  """
  if CONFIG.value is None or MODEL_PATH.value:
    config()  # Raises.
  c = read_config(_config_values(sys.argv)[-1], arguments)
  with c.unlocked():
    for field, value in overrides().items():
      if not schema.has_field(c, field):
        continue
      section, _, name = field.rpartition('.')
      (schema.get(c, section) if section else c)[name] = value
  validate.check(c)
  return c


def read_config(named: str, arguments: str = '') -> ml_collections.ConfigDict:
  """Config of `FILE[:arguments]` with more arguments appended."""
  path, _, given = named.partition(':')
  spec = importlib.util.spec_from_file_location('chosen_config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  arguments = ','.join(filter(None, (given, arguments)))
  return module.get_config(*filter(None, (arguments,)))


def run_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """Return the config that a run was started with.

  `model.path` and `model.revision` name the very model that the run started
  from, at the place that --model_path names.

  Raises:
    UsageError: there is no run, or its model is gone.
  """
  storage.check_bucket(workdir)
  snapshot = workdir / resume.CONFIG
  if not snapshot.exists():
    raise errors.UsageError(
      f'--workdir is {workdir}, which does not hold a run.'
    )
  try:
    c = schema.from_json(paths.read_json(snapshot))
  except errors.UsageError as error:
    raise errors.UsageError(
      f'--workdir is {workdir}, which does not hold a run of this version: '
      f'{error}'
    ) from error
  with c.unlocked():
    c.model.attention = 'auto'  # This may be another machine.
    if MODEL_PATH.value:
      c.model.path, c.model.revision = MODEL_PATH.value, ''
      return c
  paths.pin_model(c.model, workdir)
  model = paths.model_of_run(workdir)
  if model and not c.model.path:
    if not pathlib.Path(model['path']).is_dir():
      raise errors.UsageError(
        f'--workdir is {workdir}, whose run started from {model["path"]}, '
        'which is gone; name its new place by --model_path, or let the '
        'training command of the run make it again.'
      )
    with c.unlocked():
      c.model.path = model['path']
  return c


def overridden(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Apply `--config.section.field=value` to a config that has no file."""
  argv = [sys.argv[0], *given_fields()]
  parsed = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict(
      'config', c, flag_values=parsed, sys_argv=argv
    )
    parsed(argv)
  except _FLAG_ERRORS as error:
    raise errors.UsageError(_sentence(error, argv, c)) from error
  return parsed['config'].value


@contextlib.contextmanager
def refusing() -> Iterator[None]:
  """Turn `UsageError`, or a missing jax platform, into a sentence and code 2.

  Any other exception is a defect or a failure of the machine and keeps its
  traceback.
  """
  try:
    yield
  except Exception as error:
    sentence = errors.sentence(error)
    if sentence is None:
      raise
    print(f'error: {sentence}', file=sys.stderr)
    sys.exit(2)


# Raised by absl and ml_collections for a bad command line or config file.
_FLAG_ERRORS = (
  flags.Error,
  AttributeError,
  KeyError,
  TypeError,
  ValueError,
  SyntaxError,
  OSError,
)


def _parse(argv: list[str], changes: str) -> list[str]:
  """Parse with absl; every failure becomes one sentence."""
  _print_config_help(argv)
  for value in _config_values(argv):
    path = value.partition(':')[0]
    if not pathlib.Path(path).is_file():
      raise errors.UsageError(f'--config is {path!r}, which is not a file.')
  if any(a.startswith('--config.env.name') for a in argv):
    raise errors.UsageError(
      'env.name is set by the config file, because other fields depend on '
      'it; allowed: another file, or --config=configs/own.py:env=NAME.'
    )
  # Without a file `overridden` applies them.
  aside = [] if _config_values(argv) else given_fields(argv)
  try:
    rest = flags.FLAGS([a for a in argv if a not in aside])
  except SystemExit:  # absl has printed the help, with exit code 1.
    sys.exit(0)
  except _FLAG_ERRORS as error:
    raise errors.UsageError(_sentence(error, argv)) from error
  if len(rest) > 1:
    raise errors.UsageError(f'unexpected argument {rest[1]!r}')
  if aside and not (changes and flags.FLAGS[changes].value):
    raise errors.UsageError(
      f'{aside[0]} is a change to a config, but --config is missing; e.g. '
      '--config=configs/quickstart.py'
    )
  return rest


def _print_config_help(argv: list[str]):
  """Print the config's fields and exit, if `--help_config` is given."""
  for i, argument in enumerate(argv):
    name, equals, section = argument.partition('=')
    if name == _HELP:
      if not equals and i + 1 < len(argv) and not argv[i + 1].startswith('-'):
        section = argv[i + 1]
      print(schema.help_text(section or None))
      sys.exit(0)


def given_fields(argv: list[str] | None = None) -> list[str]:
  """Arguments that change config fields; `argv` is by default the process's."""
  return [a for a in argv or sys.argv if a.startswith('--config.')]


def _config_values(argv: list[str]) -> list[str]:
  """Values of `--config`, after `=` or as the next argument."""
  values = [b for a, b in itertools.pairwise(argv) if a == '--config']
  begin = '--config='
  return values + [a.removeprefix(begin) for a in argv if a.startswith(begin)]


def _sentence(
  error: Exception,
  argv: list[str],
  c: ml_collections.ConfigDict | None = None,
) -> str:
  """Sentence of an error, without the traceback of ml_collections."""
  own = _refusal(error)
  if own is not None:
    return str(own)
  text = ' '.join(str(error).split())
  if isinstance(error, (AttributeError, KeyError, flags.UnrecognizedFlagError)):
    known = _fields(argv) if c is None else schema.flatten(c)
    named = (_field(a) for a in given_fields(argv))
    field = next((name for name in named if name not in known), None)
    if field is not None:
      return schema.unknown_field(field, known)
  if 'before a value for --config' in text:
    return '--config=FILE must stand before --config.section.field=value.'
  text = re.split(r'\b(?:\w+Error|UsageError): ', text)[-1]
  section = re.match(
    r"flag --config\.(\S+?)=(.*): Failed to parse '.*' as a ConfigDict", text
  )
  if section:
    return (
      f'{section[1]} is {section[2]!r}, but it is a section; allowed: '
      f'--config.{section[1]}.FIELD=value.'
    )
  number = re.match(
    r'flag --config\.(\S+?)=(.*): (invalid literal for int|could not convert)',
    text,
  )
  if number:
    kind = 'whole number' if 'int' in number[3] else 'number'
    return f'{number[1]} is {number[2]!r}; allowed: a {kind}.'
  for argument in given_fields(argv):
    field, value = _field(argument), argument.partition('=')[2]
    if repr(value) in text and field not in text:
      return f'{field} is {value!r}: {text}'
  return text


def _refusal(error: BaseException | None) -> errors.UsageError | None:
  """First `UsageError` in the chain of causes of an error, or None."""
  found = None
  while error is not None:
    found = error if isinstance(error, errors.UsageError) else found
    error = error.__cause__ or error.__context__
  return found


def _fields(argv: list[str]) -> list[str]:
  """Fields of the config of a command line, or those of all configs."""
  try:
    return list(schema.flatten(read_config(_config_values(argv)[-1])))
  except Exception:  # No config file, or the file is the error.
    schemas = [schema.flatten(schema.defaults(env)) for env in schema.ENVS]
    return sorted(set(schemas[0]).intersection(*schemas[1:]))


def _field(argument: str) -> str:
  return argument.removeprefix('--config.').partition('=')[0]
