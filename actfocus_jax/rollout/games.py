"""Games: an environment with its limits, and the choice of one by seed."""

import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from actfocus_jax.envs import base
from actfocus_jax.text import chat

# The golden section. Its multiples modulo 1 fill [0, 1) evenly, so any few
# consecutive seeds have about the right shares. Every `_BLOCK` seeds the
# sequence starts at a random place; otherwise a game would only get certain
# remainders of its seeds, and with them certain boards.
_STRIDE = 0.6180339887498949
_BLOCK = 64
_WHOLE = 'allowed: a class with reset, step, instructions and actions'


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of an episode.

  Attributes:
    turns: largest number of turns.
    max_actions: largest number of actions in one turn.
    action_budget: largest number of actions in the episode.
    response_tokens: largest number of sampled ids in one turn.
    context: largest number of ids in the episode, prompts included.
    format_penalty: reward of a turn that breaks the format.
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
    name: name in the metrics.
    env: instance of `envs.base.Environment`.
    limits: limits of every episode.
    share: share of the groups, relative to the other games of the run.
  """

  name: str
  env: base.Environment
  limits: Limits
  share: float = 1.0


def pick(games: Sequence[Game], seed: int) -> Game:
  """Return the game of a group, a function of its seed alone.

  Of n consecutive seeds each game gets about n * `share` / sum of shares.
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
  """Return the reason why an object cannot be played, or None.

  The reason completes a sentence that begins with the object's name. It names
  the fault and the allowed values.
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
  """Return the reason why no answer can name an action, or None."""
  if chat.parse_answer(f'</think><answer>{name}</answer>') != [name]:
    return (
      f'has the action {name!r}, which no answer can name; allowed: text '
      'without ||, answer tags or white space at its ends'
    )
  if sum(other.lower() == name.lower() for other in names) > 1:
    return (
      f'has several actions that are {name!r} in one case or another; allowed: '
      'names that differ in more than upper and lower case'
    )
  return None


def _short(value: Any) -> str:
  return ' '.join(reprlib.repr(value).split())
