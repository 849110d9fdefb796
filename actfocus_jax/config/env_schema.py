"""What a config says of environments: one, one of the user's own, a mixture."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from actfocus_jax import errors
from actfocus_jax.config import plugins

# The keyword arguments of each envs.ENVS[name]; instructions='' are its own.
OPTIONS = {
  'frozen_lake': dict(
    size=4,
    frozen_probability=0.9,
    success_probability=0.8,
    instructions='',
  ),
  'sokoban': dict(
    rows=6, cols=6, boxes=1, search_depth=300, walk_steps=20, instructions=''
  ),
  'sudoku': dict(
    size=4,
    blanks=6,
    max_steps=16,
    allow_refill_reward=False,
    instructions='',
  ),
  'webshop': dict(
    data='',
    goals='synthetic',
    reward='strict',
    index='',
    results_per_page=10,
    shop_seed=0,
    products=150,
    instructions='',
  ),
}
# Types of the fields of the scripted players; unset ones are the player's own.
PLAYERS = {
  'frozen_lake': dict(skill=float, habit=float, length=int),
  'sokoban': dict(skill=float, length=int, habit=float),
  'sudoku': dict(skill=float, length=int, habit=float),
  'webshop': dict(skill=float, habit=float),
}
# What bounds an episode of each, as in the paper; of all others these.
_COMMON_LIMITS = dict(turns=5, max_actions=2, action_budget=10)
LIMITS = {
  'sudoku': dict(turns=8, max_actions=2, action_budget=16),
  'webshop': dict(turns=9, max_actions=1, action_budget=9),
}
MIXTURE = 'mixture'  # the env.name of a run on several environments


def limits(env: str) -> dict[str, int]:
  """Turns, actions in a turn and actions in an episode of an environment."""
  return dict(LIMITS.get(env, _COMMON_LIMITS))


def parts(shares: Mapping[str, float]) -> dict[str, dict[str, Any]]:
  """The sections of a mixture by their labels.

  Args:
    shares: Of the groups, by the name of the environment.

  Returns:
    A section for each.

  Raises:
    UsageError: When there is no such environment, or two have one label.
  """
  found: dict[str, dict[str, Any]] = {}
  for name, share in shares.items():
    label = name.rpartition(':')[2].lower()
    if label in found:
      raise errors.UsageError(
        f'env.name {name!r} and {found[label]["name"]!r} have the same label '
        f'in a mixture, {label}; allowed: classes of different names.'
      )
    found[label] = part(name, share)
  return found


def part(name: str, share: float) -> dict[str, Any]:
  """The section of one environment of a mixture."""
  return dict(
    name=name,
    share=float(share),
    options=options(name),
    boards='',
    **limits(name),
    player=player(name),
  )


def player(env: str) -> dict[str, Any]:
  """The section of the player that warm-starts an environment."""
  known = PLAYERS.get(env, {})
  unset = {n: config_dict.placeholder(kind) for n, kind in known.items()}
  return dict(name='careless' if known else 'random', options=unset)


def options(env: str) -> dict[str, Any]:
  """The options of an environment with their defaults.

  Args:
    env: A key of OPTIONS, or 'package.module:Class'.

  Returns:
    Keyword arguments.

  Raises:
    UsageError: When there is no such environment, or an argument of its class
      cannot be a field.
  """
  if ':' not in env:
    if env not in OPTIONS:
      raise errors.UsageError(
        f'env.name is {env!r}; allowed: {", ".join(OPTIONS)}, or '
        'package.module:Class for one of your own.'
      )
    return dict(OPTIONS[env])
  return plugins.options('env.name', env)


@dataclasses.dataclass(frozen=True)
class Section:
  """What the config says of one environment of a run.

  Attributes:
    field: Prefix of its fields: 'env', or 'mixture.LABEL'.
    limits_field: Prefix of turns, max_actions, action_budget.
    player_field: Prefix of the player's.
    label: Of its metrics.
    name: As in `defaults`.
    share: Of the groups.
    options: Keyword arguments of the environment.
    boards: A file, or ''.
    turns: This and the next two as in agent.games.Limits.
    max_actions: Most actions in a turn.
    action_budget: Most actions in an episode.
    player: name and options.
  """

  field: str
  limits_field: str
  player_field: str
  label: str
  name: str
  share: float
  options: Mapping[str, Any]
  boards: str
  turns: int
  max_actions: int
  action_budget: int
  player: Mapping[str, Any]


def sections(c: ml_collections.ConfigDict) -> list[Section]:
  """The environments of a run: one, or those of its mixture."""
  if c.env.name == MIXTURE:
    return [_of_mixture(label, c.mixture[label]) for label in sorted(c.mixture)]
  bounds = {name: c.limits[name] for name in _COMMON_LIMITS}
  return [
    Section(
      field='env',
      limits_field='limits',
      player_field='player',
      label=c.env.name.rpartition(':')[2].lower(),
      name=c.env.name,
      share=1.0,
      options=c.env.options,
      boards=c.env.boards,
      player=c.player,
      **bounds,
    )
  ]


def _of_mixture(label: str, part: ml_collections.ConfigDict) -> Section:
  field = f'mixture.{label}'
  return Section(
    field=field,
    limits_field=field,
    player_field=f'{field}.player',
    label=label,
    **part,
  )


def most_turns(c: ml_collections.ConfigDict) -> int:
  """The turns of the longest episode of any environment."""
  return max(section.turns for section in sections(c))
