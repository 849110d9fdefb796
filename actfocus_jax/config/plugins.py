"""Classes of the user's own, 'package.module:Class': imported, looked at, made.

Their code may do anything, so that whatever it raises is told in one sentence
that names the field, the class and the place.
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

# What a field of a config can be, for JSON and for the command line.
_PLAIN = (str, int, float, bool)
_DEFAULTS = (
  'type str, int, float, bool or a tuple of these, or None with an annotation '
  'such as `int | None`'
)


def load(field: str, name: str) -> Callable[..., Any]:
  """The class that 'package.module:Class' names.

  Args:
    field: Of the config, for the message.
    name: Importable from where the command runs.

  Returns:
    The class, or whatever else there is to be called.

  Raises:
    UsageError: When it cannot be imported, or not be called.
  """
  module, _, attribute = name.partition(':')
  try:
    found = getattr(importlib.import_module(module), attribute)
  except (Exception, SystemExit) as error:
    raise errors.UsageError(
      f'{field} is {name!r}, which cannot be imported: '
      f'{describe_exception(error)}; allowed: '
      'package.module:Class, importable from the current directory.'
    ) from error
  if not callable(found):
    raise errors.UsageError(
      f'{field} is {name!r}, which is no class but of type '
      f'{type(found).__name__}; allowed: package.module:Class.'
    )
  return found


def options(field: str, name: str) -> dict[str, Any]:
  """The keyword arguments of a class with their defaults.

  Args:
    field: Of the config, for the message.
    name: As in `load`.

  Returns:
    Values for a config; where the default is None, a placeholder of the type
    that the annotation names.

  Raises:
    UsageError: For a class that `load` refuses, and for an argument that cannot
      be a field of a config.
  """
  found = {}
  for keyword in _arguments(field, name):
    problem = _problem(keyword)
    if problem:
      raise errors.UsageError(
        f'{field} is {name!r}, whose argument {problem}; allowed: keyword '
        f'arguments, which become options, with defaults of {_DEFAULTS}.'
      )
    found[keyword.name] = keyword.default
    if keyword.default is None:
      found[keyword.name] = config_dict.placeholder(
        _optional(keyword.annotation)
      )
  return found


def make(
  field: str, name: str, options_field: str, options: Mapping[str, Any]
) -> Any:
  """Calls a class.

  Args:
    field: Of the config, for the message.
    name: As in `load`.
    options_field: The section that `options` come from, for the message.
    options: Keyword arguments.

  Returns:
    What it made.

  Raises:
    UsageError: When it raised anything.
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
  """What another's code raised and where, in a line without a full stop."""
  text = f'{type(error).__name__}: {error}' if str(error) else repr(error)
  text = ' '.join(text.split()).rstrip('.')
  frames = traceback.extract_tb(error.__traceback__)
  # Not the machinery of imports, and not this module.
  machinery = ('<frozen', importlib.__file__, __file__)
  theirs = [f for f in frames if not f.filename.startswith(machinery)]
  if not theirs:
    return text
  place = pathlib.Path(theirs[-1].filename).name
  return f'{text} ({place}, line {theirs[-1].lineno})'


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
      f'{describe_exception(error)}; '
      'allowed: a class written in Python.'
    ) from error
  return list(signature.parameters.values())


def _problem(keyword: inspect.Parameter) -> str | None:
  """What keeps an argument from being an option, or None."""
  name, value = repr(keyword.name), keyword.default
  if keyword.kind not in (keyword.KEYWORD_ONLY, keyword.POSITIONAL_OR_KEYWORD):
    return f'{str(keyword)!r} is no keyword of one name'
  if hasattr(config_dict.ConfigDict, keyword.name):
    return f'{name} has a name that no field of a config can have'
  if value is keyword.empty:
    return f'{name} has no default'
  if value is None:
    is_known = _optional(keyword.annotation)
    return None if is_known else f'{name} has the default None without a type'
  if not _is_plain(value):
    return f'{name} has a default of type {type(value).__name__}'
  return None


def _is_plain(value: Any) -> bool:
  """Whether a value comes back from JSON as it was."""
  values = value if type(value) is tuple else (value,)
  return all(type(one) in _PLAIN for one in values)


def _optional(annotation: Any) -> type | None:
  """T of the annotation `T | None`, if a config can hold one."""
  kinds = set(typing.get_args(annotation))
  if type(None) not in kinds or len(kinds) != 2:
    return None
  (kind,) = kinds - {type(None)}
  kind = typing.get_origin(kind) or kind
  return kind if kind in (*_PLAIN, tuple) else None
