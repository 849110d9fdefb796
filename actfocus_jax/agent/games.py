"""Which environment an episode plays, and what bounds it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from actfocus_jax.envs import base

# Of the golden section: multiples of it, modulo 1, fill [0, 1) evenly from the
# first on, so that any few seeds in a row have about the shares asked for.
# After so many seeds they begin elsewhere, or a game would meet certain
# remainders of its seeds only, and with them certain boards.
_STRIDE = 0.6180339887498949
_BLOCK = 64


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
