"""Scripted player of Sokoban."""

import functools
from collections.abc import Sequence

from actfocus_jax.envs import grid, sokoban
from actfocus_jax.warmstart.players import uniform

# Enough for two boxes in a room of 4 x 4. In larger ones the player gives up
# soon, because a search would take minutes.
_MOST_STATES = 2000


class SokobanCareless(uniform.Careless):
  """Follows a shortest solution now and then."""

  def _is_solved(self, state: sokoban.State) -> bool:
    return sokoban.is_solved(state)

  def _good_actions(self, state: sokoban.State) -> Sequence[str]:
    return (_solution(state) or ())[:1]

  def _after(self, state: sokoban.State, action: str) -> sokoban.State:
    return sokoban.push(state, action)

  def _thought(self, state: sokoban.State) -> str:
    """Return e.g. `I am at (2, 2), ... Push Up from (3, 3): Down, Right.`.

    It ends in the next push of a shortest solution and in its first actions,
    even if others are played.
    """
    boxes = _at('box', 'boxes', state.boxes)
    targets = _at('target', 'targets', state.room.targets)
    seen = f'I am at {state.player}, the {boxes}, the {targets}.'
    solution = _solution(state)
    if not solution:
      return f'{seen} No way.'
    here = state
    for action in solution:
      after = sokoban.push(here, action)
      if after.boxes != here.boxes:
        break
      here = after
    steps = ', '.join(solution[: self.length])
    return f'{seen} Push {action} from {here.player}: {steps}.'


@functools.lru_cache(maxsize=64)  # For the thought and for the action.
def _solution(state: sokoban.State) -> list[str] | None:
  return sokoban.solve(state, most=_MOST_STATES)


def _at(one: str, many: str, cells: frozenset[grid.Cell]) -> str:
  places = ' and '.join(str(cell) for cell in sorted(cells))
  return f'{one if len(cells) == 1 else many} at {places}'
