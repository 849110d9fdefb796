"""A player for every environment that has a table of actions."""

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


def draw(rng: np.random.Generator, actions: Iterable[str]) -> str:
  """Draw one of the actions uniformly."""
  actions = tuple(actions)
  return actions[rng.integers(len(actions))]
