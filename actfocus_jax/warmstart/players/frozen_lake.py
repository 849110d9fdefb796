"""Scripted players of FrozenLake."""

import dataclasses
from collections.abc import Sequence

from actfocus_jax.envs import frozen_lake, grid
from actfocus_jax.warmstart.players import uniform


class FrozenLakeCareless(uniform.Careless):
  """Walks towards the goal and overlooks the holes."""

  def _is_solved(self, state: frozen_lake.State) -> bool:
    return state.player == state.lake.goal

  def _good_actions(self, state: frozen_lake.State) -> Sequence[str]:
    return [way for way, _ in _ways(state.player, state.lake.goal)]

  def _after(self, state: frozen_lake.State, action: str) -> frozen_lake.State:
    moved = frozen_lake.slide(state.lake, state.player, action)
    return dataclasses.replace(state, player=moved)

  def _thought(self, state: frozen_lake.State) -> str:
    """Return e.g. `I am at (1, 3), the goal is at (2, 0): 1 down, 3 left.`."""
    goal = state.lake.goal
    ways = (f'{n} {way.lower()}' for way, n in _ways(state.player, goal))
    return f'I am at {state.player}, the goal is at {goal}: {", ".join(ways)}.'


class FrozenLakeCareful(FrozenLakeCareless):
  """Follows a shortest path around the holes with probability `skill`."""

  def _good_actions(self, state: frozen_lake.State) -> Sequence[str]:
    return (frozen_lake.shortest_path(state) or ())[:1]


def _ways(cell: grid.Cell, goal: grid.Cell) -> list[tuple[str, int]]:
  """Return the directions that come closer to the goal, with the distances."""
  down, right = goal[0] - cell[0], goal[1] - cell[1]
  ways = [
    ('Down' if down > 0 else 'Up', abs(down)),
    ('Right' if right > 0 else 'Left', abs(right)),
  ]
  return [(action, cells) for action, cells in ways if cells]
