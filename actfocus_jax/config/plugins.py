"""User-defined classes, 'package.module:Class': import, options, instances.

Their code may raise anything. Each error becomes one sentence that names the
field, the class and the line.
"""

import importlib
import inspect
import pathlib
import traceback
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import config_dict

from actfocus_jax import errors

# Types of a field, for JSON and for the command line.
_PLAIN = (str, int, float, bool)
_DEFAULTS = (
  'type str, int, float, bool or a tuple of these, or None with an annotation '
  'such as `int | None`'
)


def load(field: str, name: str) -> Callable[..., Any]:
  """Import 'package.module:Class', a class or any other callable.

  Raises:
    UsageError: it cannot be imported or called; the message names `field`.
  """
  module, _, attribute = name.partition(':')
  try:
    kind = getattr(importlib.import_module(module), attribute)
  except (Exception, SystemExit) as error:
    raise errors.UsageError(
      f'{field} is {name!r}, which cannot be imported: '
      f'{describe_exception(error)}; allowed: package.module:Class, importable '
      'from the current directory.'
    ) from error
  if not callable(kind):
    raise errors.UsageError(
      f'{field} is {name!r}, which is not a class but of type '
      f'{type(kind).__name__}; allowed: package.module:Class.'
    )
  return kind


def options(field: str, name: str) -> dict[str, Any]:
  """Return the keyword arguments of a class with their defaults, for a config.

  A default of None becomes a placeholder of the type in the annotation.

  Raises:
    UsageError: the class cannot be imported, or an argument cannot be a field.
  """
  values = {}
  for argument in _arguments(field, name):
    problem = _problem(argument)
    if problem:
      raise errors.UsageError(
        f'{field} is {name!r}, whose argument {problem}; allowed: keyword '
        f'arguments, which become options, with defaults of {_DEFAULTS}.'
      )
    values[argument.name] = argument.default
    if argument.default is None:
      kind = _optional(argument.annotation)
      values[argument.name] = config_dict.placeholder(kind)
  return values


def make(
  field: str, name: str, options_field: str, options: Mapping[str, Any]
) -> Any:
  """Make an instance of a class with the options of a section.

  Raises:
    UsageError: the class cannot be imported, or raises an exception.
  """
  kind = load(field, name)
  try:
    return kind(**options)
  except (Exception, SystemExit) as error:
    given = ', '.join(f'{key}={value!r}' for key, value in options.items())
    raise errors.UsageError(
      f'{field} is {name!r}, which cannot be made with {options_field} '
      f'({given}): {describe_exception(error)}; allowed: options that the '
      'class takes.'
    ) from error


def describe_exception(error: BaseException) -> str:
  """Return type, message and line of an exception, without a full stop."""
  text = f'{type(error).__name__}: {error}' if str(error) else repr(error)
  text = ' '.join(text.split()).rstrip('.')
  # Neither the frames of the import system nor those of this module.
  skipped = ('<frozen', importlib.__file__, __file__)
  frames = traceback.extract_tb(error.__traceback__)
  frames = [f for f in frames if not f.filename.startswith(skipped)]
  if not frames:
    return text
  file = pathlib.Path(frames[-1].filename).name
  return f'{text} ({file}, line {frames[-1].lineno})'


def _arguments(field: str, name: str) -> list[inspect.Parameter]:
  kind = load(field, name)
  try:
    try:
      signature = inspect.signature(kind, eval_str=True)
    except Exception:  # An annotation that cannot be evaluated.
      signature = inspect.signature(kind)
  except (TypeError, ValueError) as error:
    raise errors.UsageError(
      f'{field} is {name!r}, whose arguments cannot be read: '
      f'{describe_exception(error)}; allowed: a class written in Python.'
    ) from error
  return list(signature.parameters.values())


def _problem(argument: inspect.Parameter) -> str | None:
  """Return the reason why an argument cannot be an option, or None."""
  name, value = repr(argument.name), argument.default
  kinds = argument.KEYWORD_ONLY, argument.POSITIONAL_OR_KEYWORD
  if argument.kind not in kinds:
    return f'{str(argument)!r} is not a keyword of one name'
  if hasattr(config_dict.ConfigDict, argument.name):
    return f'{name} has a name that no field of a config can have'
  if value is argument.empty:
    return f'{name} has no default'
  if value is None and not _optional(argument.annotation):
    return f'{name} has the default None without a type'
  items = value if type(value) is tuple else (value,)
  if value is not None and not all(type(item) in _PLAIN for item in items):
    return f'{name} has a default of type {type(value).__name__}'
  return None


def _optional(annotation: Any) -> type | None:
  """Return T of the annotation `T | None`, if T can be the type of a field."""
  kinds = set(typing.get_args(annotation))
  if type(None) not in kinds or len(kinds) != 2:
    return None
  (kind,) = kinds - {type(None)}
  kind = typing.get_origin(kind) or kind
  return kind if kind in (*_PLAIN, tuple) else None
