"""Which environment an episode plays, and what bounds it."""

import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from actfocus_jax.envs import base
from actfocus_jax.text import chat

# Of the golden section: multiples of it, modulo 1, fill [0, 1) evenly from the
# first on, so that any few seeds in a row have about the shares asked for.
# After so many seeds they begin elsewhere, or a game would meet certain
# remainders of its seeds only, and with them certain boards.
_STRIDE = 0.6180339887498949
_BLOCK = 64
_WHOLE = 'allowed: a class with reset, step, instructions and actions'


@dataclasses.dataclass(frozen=True)
class Limits:
  """What bounds an episode.

  Attributes:
    turns: Most turns.
    max_actions: Most actions run in one turn.
    action_budget: Most actions in the episode.
    response_tokens: Most sampled ids in one turn.
    context: Most ids in the episode, prompts included.
    format_penalty: Added to the return of a turn that breaks the format.
  """

  turns: int = 5
  max_actions: int = 2
  action_budget: int = 10
  response_tokens: int = 400
  context: int = 3600
  format_penalty: float = -0.1


@dataclasses.dataclass(frozen=True)
class Game:
  """An environment with its limits.

  Attributes:
    name: Of its metrics.
    env: The environment.
    limits: Of every episode.
    share: Of the groups, relative to other games of the same run.
  """

  name: str
  env: base.Environment
  limits: Limits
  share: float = 1.0


def pick(games: Sequence[Game], seed: int) -> Game:
  """The game of a group: a function of its seed alone.

  Args:
    games: At least one, with shares above 0.
    seed: Of the group.

  Returns:
    One of them; of n seeds in a row about `share` / sum of shares get each.
  """
  block, index = divmod(seed, _BLOCK)
  begin = np.random.default_rng(block).random() if len(games) > 1 else 0.0
  place = (begin + index * _STRIDE) % 1.0 * sum(game.share for game in games)
  for game in games:
    if place < game.share:
      return game
    place -= game.share
  return games[-1]  # The shares add up only to rounding.


def problem(env: Any) -> str | None:
  """What makes an object no environment.

  Args:
    env: Of a class of the user's own.

  Returns:
    What it has and what is allowed, as the end of a sentence that begins with
    its name; None if it can be played.
  """
  for name in ('reset', 'step'):
    if not callable(getattr(env, name, None)):
      return f'has no method `{name}`; {_WHOLE}'
  for name in ('instructions', 'actions'):
    if not hasattr(env, name):
      return f'has no `{name}`; {_WHOLE}'
  if not isinstance(env.instructions, str):
    return f'has the instructions {_short(env.instructions)}; allowed: a text'
  most = getattr(env, 'evaluation_boards', None)
  if most is not None and not isinstance(most, int):
    return f'has the evaluation_boards {_short(most)}; allowed: an int'
  names = env.actions
  is_table = isinstance(names, (tuple, list))
  if not is_table or not all(isinstance(name, str) for name in names):
    return (
      f'has the actions {_short(names)}; allowed: a tuple of names, or () for '
      'an environment that judges strings itself'
    )
  return next(filter(None, (_unplayable(names, name) for name in names)), None)


def _unplayable(names: Sequence[str], name: str) -> str | None:
  """Why no answer means the action of this name, or None if one does."""
  if chat.parse_answer(f'</think><answer>{name}</answer>') != [name]:
    return (
      f'has the action {name!r}, which no answer can name; allowed: text '
      'without ||, tags of answers or white space around it'
    )
  if sum(other.lower() == name.lower() for other in names) > 1:
    return (
      f'has several actions that are {name!r} in one case or another; allowed: '
      'names that differ in more than upper and lower case'
    )
  return None


def _short(value: Any) -> str:
  return ' '.join(reprlib.repr(value).split())
