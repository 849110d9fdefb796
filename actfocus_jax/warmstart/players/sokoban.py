"""Scripted player of Sokoban."""

import dataclasses
import functools

import numpy as np

from actfocus_jax.envs import grid, sokoban
from actfocus_jax.warmstart.players import uniform

# Enough for two boxes in a room of 4 x 4. In larger ones the player gives up
# soon, because a search would take minutes.
_MOST_STATES = 2000


@dataclasses.dataclass(frozen=True)
class SokobanCareless:
  """Follows a shortest solution now and then.

  Attributes:
    skill: probability, per action, of the next action of a shortest solution;
      where none is found the action is uniformly random.
    length: most actions in one turn.
    habit: probability, per action, of `Up`, whatever the room; what remains of
      1 is a uniformly random action.
  """

  skill: float = 0.4
  length: int = 2
  habit: float = 0.0

  def respond(
    self, env: sokoban.Sokoban, state: sokoban.State, rng: np.random.Generator
  ) -> tuple[str, list[str]]:
    """Return e.g. `I am at (2, 2), ... Push Up from (3, 3): Down, Right.`.

    The thought ends in the next push of a shortest solution and in its first
    actions, even if others are played. The second action starts from where
    the first leads; if that solves the room, there is none.
    """
    here, actions = state, []
    while len(actions) < self.length and not sokoban.is_solved(here):
      actions.append(self._act(env, here, rng))
      here = sokoban.push(here, actions[-1])
    return self._thought(state), actions

  def _act(self, env, state: sokoban.State, rng) -> str:
    luck = rng.random()
    if luck < self.skill:
      solution = _solution(state)
      return uniform.draw(rng, solution[:1] if solution else env.actions)
    if luck < self.skill + self.habit:
      return 'Up'
    return uniform.draw(rng, env.actions)

  def _thought(self, state: sokoban.State) -> str:
    boxes = _at('box', 'boxes', state.boxes)
    targets = _at('target', 'targets', state.room.targets)
    seen = f'I am at {state.player}, the {boxes}, the {targets}.'
    return f'{seen} {self._plan(state)}'

  def _plan(self, state: sokoban.State) -> str:
    solution = _solution(state)
    if not solution:
      return 'No way.'
    here = state
    for action in solution:
      after = sokoban.push(here, action)
      if after.boxes != here.boxes:
        break
      here = after
    steps = ', '.join(solution[: self.length])
    return f'Push {action} from {here.player}: {steps}.'


@functools.lru_cache(maxsize=64)  # For the thought and for the action.
def _solution(state: sokoban.State) -> list[str] | None:
  return sokoban.solve(state, most=_MOST_STATES)


def _at(one: str, many: str, cells: frozenset[grid.Cell]) -> str:
  places = ' and '.join(str(cell) for cell in sorted(cells))
  return f'{one if len(cells) == 1 else many} at {places}'
