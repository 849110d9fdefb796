"""Sokoban: push every box onto a target.

One step:

1. The action names a direction; the cell ahead decides.
2. Floor: the player moves. A box with free floor behind it: both move. Else
   nothing moves.
3. Reward: -0.1 for the action, +1 if more boxes stand on targets than before,
   -1 if fewer, +10 if all do. So the winning push gives 10.9.
4. Done, and success, when all boxes stand on targets.
"""

import dataclasses
import math

from actfocus_jax.envs import base, grid, sokoban_generator

ACTIONS = ('Up', 'Down', 'Left', 'Right')
STEP_REWARD = -0.1
BOX_REWARD = 1.0
SOLVED_REWARD = 10.0
_SEARCHED = 1_000  # states of a room that is small enough to be searched

_SYMBOLS = '#_O√XPS'
_PUBLIC = frozenset('-.$*@+')
_TRANSLATION = str.maketrans(' -.$*@+', '__OX√PS')

_INSTRUCTIONS = """\
You play Sokoban. Push every box onto a target.
Symbols: # wall, _ floor, O target, X box, √ box on a target, P you, S you on \
a target.
You move one cell up, down, left or right. Walking into a box pushes it if the \
cell behind it is free. Boxes cannot be pulled, so a box in a corner is stuck.
Every action costs 0.1. A box pushed onto a target gives 1, a box pushed off a \
target costs 1, and all boxes on targets give 10.
Actions: Up, Down, Left, Right."""


@dataclasses.dataclass(frozen=True)
class Room:
  """The constant part. Every cell that is not floor is wall."""

  rows: int
  cols: int
  floor: frozenset[grid.Cell]
  targets: frozenset[grid.Cell]


@dataclasses.dataclass(frozen=True)
class State:
  """Cells of the player and the boxes."""

  room: Room
  player: grid.Cell
  boxes: frozenset[grid.Cell]


class Sokoban:
  """The environment; see the module's docstring for its dynamics."""

  actions = ACTIONS

  def __init__(
    self,
    *,
    rows: int = 6,
    cols: int = 6,
    boxes: int = 1,
    search_depth: int = 300,
    walk_steps: int = 20,
    instructions: str | None = None,
  ):
    """Fix the kind of room; configs/README.md explains the fields."""
    if min(rows, cols) < 3:
      raise ValueError(f'rows and cols must be >= 3, got {rows} and {cols}')
    if min(boxes, search_depth, walk_steps) < 1:
      raise ValueError(
        'boxes, search_depth and walk_steps must be >= 1, got '
        f'{boxes}, {search_depth} and {walk_steps}'
      )
    # Boxes off their targets, the targets, and the player: all on floor.
    if (rows - 2) * (cols - 2) < 2 * boxes + 1:
      raise ValueError(f'{boxes} boxes do not fit into {rows} x {cols} cells')
    self.rows, self.cols = rows, cols
    self._kind = dict(
      rows=rows,
      cols=cols,
      boxes=boxes,
      search_depth=search_depth,
      walk_steps=walk_steps,
    )
    self.instructions = _INSTRUCTIONS if instructions is None else instructions

  def reset(self, seed: int) -> tuple[State, str]:
    """Generate a room that can be solved.

    Raises:
      RuntimeError: no such room found; it is too small for its boxes.
    """
    level = sokoban_generator.generate(seed, **self._kind)
    room = Room(self.rows, self.cols, level.floor, frozenset(level.targets))
    state = State(room, level.player, frozenset(level.boxes))
    return state, self.render(state)

  def load(self, board: str, *, seed: int = 0) -> tuple[State, str]:
    """Read a room of any size; boxes may stand on targets.

    Args:
      board: rows of # (wall), _ (floor), O (target), X (box), √ (box on
        target), P (player) and S (player on target), or in the symbols of
        public level files: blank or - (floor), `.` (target), $ (box), * (box
        on target), @ (player), + (player on target), where blanks outside of
        the walls are walls and rows may be of several lengths.
      seed: unused; a room has no noise.

    Raises:
      ValueError: not a rectangle of these symbols with one player, at least one
        box, and a target for every box.
    """
    del seed
    used = set().union(*(line.strip() for line in board.splitlines()))
    unknown = sorted(used - _PUBLIC - set(_SYMBOLS) - {' '})
    if unknown:
      raise ValueError(
        f'unknown symbols {unknown}; a room has {" ".join(_SYMBOLS)}, or those '
        'of public level files, # blank - . $ * @ +'
      )
    if _PUBLIC & set(board):
      board = _from_public(board)
    cells = grid.parse(board, _SYMBOLS)
    players = grid.cells_of(cells, 'PS')
    boxes = frozenset(grid.cells_of(cells, 'X√'))
    targets = frozenset(grid.cells_of(cells, 'O√S'))
    if len(players) != 1 or not 1 <= len(boxes) <= len(targets):
      raise ValueError(
        'a room has one player, a box and a target per box, got '
        f'{len(players)} players, {len(boxes)} boxes, {len(targets)} targets'
      )
    rows, cols = (1 + max(axis) for axis in zip(*cells, strict=True))
    floor = frozenset(cells) - frozenset(grid.cells_of(cells, '#'))
    state = State(Room(rows, cols, floor, targets), players[0], boxes)
    return state, self.render(state)

  def is_solved(self, state: State) -> bool:
    """Return whether all boxes stand on targets."""
    return is_solved(state)

  def is_unsolvable(self, state: State) -> bool:
    """Return whether a short search proves that there is no solution.

    True if a box could not be pushed onto any target even if it were alone, or
    if the room has few states and none of them is solved. False leaves it open.
    """
    if not state.boxes <= _within_reach(state.room):
      return True
    cells, boxes = len(state.room.floor), len(state.boxes)
    is_small = cells * math.comb(cells, boxes) <= _SEARCHED
    return is_small and solve(state) is None

  def step(self, state: State, action: str) -> tuple[State, base.Step]:
    """Run one action; the info has `boxes_on_targets`."""
    following = push(state, base.require_action(ACTIONS, action))
    before, after = boxes_on_targets(state), boxes_on_targets(following)
    solved = is_solved(following)
    reward = STEP_REWARD
    if after != before:
      reward += BOX_REWARD if after > before else -BOX_REWARD
    if solved:
      reward += SOLVED_REWARD
    return following, base.Step(
      text=self.render(following),
      reward=reward,
      done=solved,
      success=solved,
      info={'effective': following != state, 'boxes_on_targets': after},
    )

  def render(self, state: State) -> str:
    """Write the rows of the room, one symbol per cell, nothing else."""
    return '\n'.join(
      ''.join(_symbol(state, (row, col)) for col in range(state.room.cols))
      for row in range(state.room.rows)
    )


def push(state: State, action: str) -> State:
  """Return the state after a move or push; the same state if it is blocked."""
  ahead = grid.neighbour(state.player, action)
  if ahead not in state.room.floor:
    return state
  if ahead not in state.boxes:
    return dataclasses.replace(state, player=ahead)
  behind = grid.neighbour(ahead, action)
  if behind not in state.room.floor or behind in state.boxes:
    return state
  return State(state.room, ahead, state.boxes - {ahead} | {behind})


def boxes_on_targets(state: State) -> int:
  """Return the number of boxes on targets."""
  return len(state.boxes & state.room.targets)


def _from_public(board: str) -> str:
  """Translate a room from the symbols of public level files."""
  rows = [line.rstrip() for line in board.splitlines() if line.strip()]
  width = max(len(row) for row in rows)
  filled = []
  for row in rows:
    inner = row.lstrip()
    blank = len(row) - len(inner)
    filled.append(('#' * blank + inner).ljust(width, '#'))
  return '\n'.join(row.translate(_TRANSLATION) for row in filled)


def is_solved(state: State) -> bool:
  """Return whether all boxes stand on targets."""
  return state.boxes <= state.room.targets


def solve(state: State, *, most: int | None = None) -> list[str] | None:
  """Find a shortest solution by breadth-first search over all states.

  A room of 4 x 4 floor cells has 240 states with one box, 1,680 with two.
  None if there is no solution, or if none was found within `most` states.
  """

  def successors(state):
    return ((action, push(state, action)) for action in ACTIONS)

  return grid.shortest_path(state, successors, is_solved, most)


def _within_reach(room: Room) -> set[grid.Cell]:
  """Return the cells from which a lone box can be pushed onto a target."""
  found, queue = set(room.targets), [*room.targets]
  while queue:
    cell = queue.pop()
    for row, col in grid.MOVES.values():
      before = cell[0] - row, cell[1] - col
      player = before[0] - row, before[1] - col
      if before not in found and {before, player} <= room.floor:
        found.add(before)
        queue.append(before)
  return found


def _symbol(state: State, cell: grid.Cell) -> str:
  is_target = cell in state.room.targets
  if cell == state.player:
    return 'S' if is_target else 'P'
  if cell in state.boxes:
    return '√' if is_target else 'X'
  if cell in state.room.floor:
    return 'O' if is_target else '_'
  return '#'
