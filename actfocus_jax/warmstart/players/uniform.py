"""Players of environments that have a table of actions."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from actfocus_jax.envs import base


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Takes a uniformly random action of any table."""

  def respond(
    self, env: base.Environment, state: base.State, rng: np.random.Generator
  ) -> tuple[str, list[str]]:
    """Return e.g. `I try Left.` and the action."""
    del state
    if not env.actions:
      raise ValueError(
        'The player random needs an environment with a table of actions; name '
        "one of your own, player.name='package.module:Class'."
      )
    action = draw(rng, env.actions)
    return f'I try {action}.', [action]


@dataclasses.dataclass(frozen=True)
class Careless:
  """Takes a good action now and then.

  A class of each environment has `_is_solved(state)`, `_good_actions(state)`,
  `_after(state, action)` and `_thought(state)`.

  Attributes:
    skill: probability, per action, of one of the good actions; if there is
      none, the action is uniformly random.
    habit: probability, per action, of `Up`, whatever the board; what remains
      of 1 is a uniformly random action.
    length: most actions in one turn.
  """

  skill: float = 0.4
  habit: float = 0.0
  length: int = 2

  def respond(
    self, env: base.Environment, state: base.State, rng: np.random.Generator
  ) -> tuple[str, list[str]]:
    """Return a thought on the state, and the actions.

    The second action starts from where the first leads without noise; if that
    solves the board, there is none.
    """
    here, actions = state, []
    while len(actions) < self.length and not self._is_solved(here):
      luck, options = rng.random(), env.actions
      if luck < self.skill:
        options = self._good_actions(here) or options
      elif luck < self.skill + self.habit:
        options = None
      actions.append(draw(rng, options) if options else 'Up')
      here = self._after(here, actions[-1])
    return self._thought(state), actions


def draw(rng: np.random.Generator, actions: Iterable[str]) -> str:
  """Draw one of the actions uniformly."""
  actions = tuple(actions)
  return actions[rng.integers(len(actions))]
