"""A scripted player of Sokoban."""

import dataclasses

import numpy as np

from actfocus_jax.envs import grid, sokoban
from actfocus_jax.envs.players import uniform


@dataclasses.dataclass(frozen=True)
class SokobanCareless:
  """Follows a shortest solution, now and then.

  Attributes:
    skill: probability, per action, of the first action of a shortest solution;
      else, and where there is no solution, the action is uniformly random.
    length: most actions in one turn.
  """

  skill: float = 0.4
  length: int = 2

  def respond(
    self, env: sokoban.Sokoban, state: sokoban.State, rng: np.random.Generator
  ) -> tuple[str, list[str]]:
    """Returns e.g. `I am at (2, 3), the box at (3, 3), the target at (4, 1).`.

    The second action starts from where the first leads; if that solves the room
    there is no second one.
    """
    here, actions = state, []
    while len(actions) < self.length and not sokoban.is_solved(here):
      is_skilled = rng.random() < self.skill
      solution = sokoban.solve(here) if is_skilled else None
      actions.append(
        uniform.draw(rng, solution[:1] if solution else env.actions)
      )
      here = sokoban.push(here, actions[-1])
    return _sokoban_thought(state), actions


def _sokoban_thought(state: sokoban.State) -> str:
  boxes = _at('box', 'boxes', state.boxes)
  targets = _at('target', 'targets', state.room.targets)
  return f'I am at {state.player}, the {boxes}, the {targets}.'


def _at(one: str, many: str, cells: frozenset[grid.Cell]) -> str:
  places = ' and '.join(str(cell) for cell in sorted(cells))
  return f'{one if len(cells) == 1 else many} at {places}'
