"""Scripted players of FrozenLake."""

import dataclasses

import numpy as np

from actfocus_jax.envs import frozen_lake, grid
from actfocus_jax.warmstart.players import uniform


@dataclasses.dataclass(frozen=True)
class FrozenLakeCareless:
  """Walks towards the goal and overlooks the holes.

  Attributes:
    skill: probability, per action, of a step that comes closer to the goal.
    habit: probability, per action, of `Up`, whatever the board; what remains
      of 1 is a uniformly random action.
    length: most actions in one turn.
  """

  skill: float = 0.4
  habit: float = 0.0
  length: int = 2

  def respond(
    self,
    env: frozen_lake.FrozenLake,
    state: frozen_lake.State,
    rng: np.random.Generator,
  ) -> tuple[str, list[str]]:
    """Return e.g. `I am at (1, 3), the goal is at (2, 0): 1 down, 3 left.`.

    The second action starts from where the first leads on firm ice; if that is
    the goal, there is none.
    """
    here, actions = state, []
    while len(actions) < self.length and here.player != here.lake.goal:
      actions.append(self._act(env, here, rng))
      moved = frozen_lake.slide(here.lake, here.player, actions[-1])
      here = dataclasses.replace(here, player=moved)
    return _frozen_lake_thought(state), actions

  def _act(self, env, state: frozen_lake.State, rng) -> str:
    luck = rng.random()
    if luck < self.skill:
      return uniform.draw(rng, self._good_actions(state) or env.actions)
    if luck < self.skill + self.habit:
      return 'Up'
    return uniform.draw(rng, env.actions)

  def _good_actions(self, state: frozen_lake.State) -> tuple[str, ...]:
    return tuple(way for way, _ in _ways(state.player, state.lake.goal))


@dataclasses.dataclass(frozen=True)
class FrozenLakeCareful(FrozenLakeCareless):
  """Follows a shortest path around the holes with probability `skill`."""

  def _good_actions(self, state: frozen_lake.State) -> tuple[str, ...]:
    return tuple((frozen_lake.shortest_path(state) or ())[:1])


def _ways(cell: grid.Cell, goal: grid.Cell) -> list[tuple[str, int]]:
  """Return the directions that come closer to the goal, with the distances."""
  down, right = goal[0] - cell[0], goal[1] - cell[1]
  ways = [
    ('Down' if down > 0 else 'Up', abs(down)),
    ('Right' if right > 0 else 'Left', abs(right)),
  ]
  return [(action, cells) for action, cells in ways if cells]


def _frozen_lake_thought(state: frozen_lake.State) -> str:
  goal = state.lake.goal
  ways = (f'{n} {way.lower()}' for way, n in _ways(state.player, goal))
  return f'I am at {state.player}, the goal is at {goal}: {", ".join(ways)}.'
