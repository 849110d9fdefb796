"""From a config to what is played: environments, their limits, who shows them.

`env` and `player.name` are looked up here, in literal dicts, and nobody further
down knows their names; `recipe` is that place for the learner.
"""

import dataclasses
import pathlib

import ml_collections

from actfocus_jax import envs
from actfocus_jax.config import fields, plugins, schema
from actfocus_jax.envs import boards
from actfocus_jax.rollout import env_pool as env_pool_lib
from actfocus_jax.rollout import games as games_lib
from actfocus_jax.warmstart import players

ConfigDict = ml_collections.ConfigDict

_ENDLESS = 10**8  # a context that nobody fills


def games(
  c: ConfigDict, *, by_hand: bool = False
) -> tuple[games_lib.Game, ...]:
  """What a run plays.

  Args:
    c: The config.
    by_hand: Whether it is played without a model: then no context ends an
      episode, and a file may hold any number of boards.

  Returns:
    A game for each environment.

  Raises:
    ValueError: One sentence on what cannot be made.
  """
  return tuple(
    games_lib.Game(
      section.label,
      environment(c, section, by_hand=by_hand),
      limits(c, section, **({'context': _ENDLESS} if by_hand else {})),
      section.share,
    )
    for section in schema.sections(c)
  )


def environment(
  c: ConfigDict, section: schema.Section, *, by_hand: bool = False
):
  """The environment of one section, on its own boards if it names any."""
  field = f'{section.field}.options'
  if section.name in envs.ENVS:
    options = dict(section.options)
    options['instructions'] = options['instructions'] or None
    try:
      env = envs.ENVS[section.name](**options)
    except (TypeError, ValueError) as error:
      told = str(error).rstrip('.')
      raise ValueError(f'{field}: {told}.') from error
  else:
    name = f'{section.field}.name'
    env = plugins.make(name, section.name, field, section.options)
    try:
      problem = games_lib.problem(env)
    except (Exception, SystemExit) as error:  # A property may do anything.
      problem = f'cannot be looked at: {plugins.describe_exception(error)}'
    if problem:
      raise ValueError(f'{name} is {section.name!r}, which {problem}.')
  if not section.boards:
    if not by_hand:
      _check_evaluation(c, section, env)
    return env
  return boards.OnBoards.read(
    env,
    pathlib.Path(section.boards).expanduser(),
    field=f'{section.field}.boards',
    held_out=range(c.eval.first_seed, c.eval.first_seed + c.eval.prompts),
    few=by_hand,
  )


def _check_evaluation(c: ConfigDict, section: schema.Section, env):
  """Raises ValueError where an evaluation would count a board twice."""
  most = getattr(env, 'evaluation_boards', None)
  if most is not None and c.eval.prompts > most:
    raise ValueError(
      f'eval.prompts is {c.eval.prompts}, but {section.name!r} with these '
      f'{section.field}.options has {most} different boards for evaluation; '
      f'allowed: 1 to {most}.'
    )


def player(section: schema.Section):
  """The scripted player whose demonstrations warm-start the small model."""
  name, field = section.player.name, f'{section.player_field}.name'
  if ':' in name:
    made = plugins.make(field, name, f'{section.player_field}.options', {})
    if callable(getattr(made, 'respond', None)):
      return made
    raise ValueError(
      f'{field} is {name!r}, which has no method `respond`; allowed: a class '
      'with respond(env, state, rng) -> (thought, actions).'
    )
  choices = players.PLAYERS.get(section.name, players.FOR_ALL)
  if name not in choices:
    raise ValueError(
      f'{field} is {name!r}; allowed for {section.name}: {", ".join(choices)}, '
      'or package.module:Class for one of your own.'
    )
  try:
    given = {k: v for k, v in section.player.options.items() if v is not None}
    return dataclasses.replace(choices[name], **given)
  except TypeError as error:
    raise ValueError(f'{section.player_field}.options: {error}.') from error


def limits(
  c: ConfigDict, section: schema.Section, **others: int
) -> games_lib.Limits:
  """What bounds an episode; `others` go before the config."""
  own = {name: getattr(section, name) for name in fields.limits('')}
  return games_lib.Limits(**{**c.limits, **own, **others})


def host(c: ConfigDict) -> env_pool_lib.EnvPool:
  """Where the environments of a run are reset and stepped."""
  return env_pool_lib.EnvPool(c.env.threads, c.env.time_limit)
