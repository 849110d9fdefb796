"""What the fields of environments and of their players allow."""

import pathlib

import ml_collections

from actfocus_jax import errors
from actfocus_jax.config import env_schema, plugins

# Of our own environments and their players; both ends are allowed.
_OPTION_BOUNDS = {
  'size': (2, 16),
  'blanks': (1, 81),
  'max_steps': (1, 1000),
  'results_per_page': (1, 50),
  'products': (10, 10_000),
  'frozen_probability': (0.1, 1),
  'success_probability': (0, 1),
  'rows': (3, 32),
  'cols': (3, 32),
  'boxes': (1, 5),
  'search_depth': (1, 10_000),
  'walk_steps': (1, 10_000),
  'skill': (0, 1),
  'habit': (0, 1),
  'length': (1, 100),
}
_OPTION_CHOICES = {
  ('sudoku', 'size'): (4, 9),
  ('webshop', 'goals'): ('synthetic', 'human'),
  ('webshop', 'reward'): ('strict', 'graded'),
}


def check(c: ml_collections.ConfigDict):
  """Refuses values of environments and players that cannot work.

  Args:
    c: The config.

  Raises:
    UsageError: One sentence: the field, its value, what is allowed.
  """
  for section in env_schema.sections(c):
    if section.name in env_schema.OPTIONS:
      _check_options(f'{section.field}.options', section.options)
      _check_option_choices(section)
      _check_blanks(section)
      _check_options(f'{section.player_field}.options', section.player.options)
    boards = pathlib.Path(section.boards).expanduser()
    if section.boards and not boards.is_file():
      raise errors.UsageError(
        f'{section.field}.boards is {section.boards!r}, which is no file; '
        "allowed: '' or a file of boards."
      )
    if section.share <= 0:
      raise errors.UsageError(
        f'{section.field}.share is {section.share}; allowed: above 0.'
      )
    _check_bounds(section)
    _check_player(section, is_played=not c.model.path)
  host = c.env
  if host.time_limit is not None and not (host.threads and host.time_limit > 0):
    raise errors.UsageError(
      f'env.time_limit is {host.time_limit} with env.threads {host.threads}; '
      'allowed: None, or seconds above 0 with env.threads 1 or more.'
    )


def _check_options(section: str, options):
  for name, (low, high) in _OPTION_BOUNDS.items():
    value = options.get(name)
    if isinstance(value, (int, float)) and not low <= value <= high:
      raise errors.UsageError(
        f'{section}.{name} is {value}; allowed: {low:g} to {high:g}.'
      )


def _check_option_choices(section: env_schema.Section):
  for (env, name), allowed in _OPTION_CHOICES.items():
    if section.name == env and section.options[name] not in allowed:
      raise errors.UsageError(
        f'{section.field}.options.{name} is {section.options[name]!r}; '
        f'allowed: {", ".join(map(str, allowed))}.'
      )


def _check_blanks(section: env_schema.Section):
  if section.name != 'sudoku' or section.boards:
    return
  most = min(
    section.options.max_steps,
    section.action_budget,
    section.turns * section.max_actions,
  )
  if section.options.blanks > most:
    raise errors.UsageError(
      f'{section.field}.options.blanks is {section.options.blanks}, more than '
      f'the {most} actions of an episode; allowed: that or fewer, or more '
      f'actions ({section.field}.options.max_steps, '
      f'{section.limits_field}.action_budget, turns and max_actions).'
    )


def _check_bounds(section: env_schema.Section):
  for name in ('turns', 'max_actions', 'action_budget'):
    if getattr(section, name) < 1:
      raise errors.UsageError(
        f'{section.limits_field}.{name} is {getattr(section, name)}; allowed: '
        '1 or more.'
      )


def _check_player(section: env_schema.Section, *, is_played: bool):
  name, field = section.player.name, section.player_field
  if ':' not in name:
    return
  for option, value in section.player.options.items():
    if value is not None:
      raise errors.UsageError(
        f'{field}.options.{option} is {value!r}, but {field}.name is {name!r}, '
        'a class of your own, which is made without options; allowed: None.'
      )
  if is_played:  # Only the small model is made from what it plays.
    plugins.load(f'{field}.name', name)
