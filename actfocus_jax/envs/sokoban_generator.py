"""Sokoban rooms that can be solved, because they are played backwards.

The stages of one room:

1. A random walk digs the floor: at each step it may turn, moves one cell, and
   stamps one of five small masks around itself. The border stays wall.
2. The player and the targets are put on random floor, a box on every target.
3. Reverse play: the player walks and pulls the box behind it, if any. A
   depth-first search visits what can be reached so and keeps the state whose
   boxes are farthest from their targets. Pulls read backwards are pushes, so
   the room can be solved.
4. The player walks a few random cells away from where the search left it.
5. Rooms in which no box could be moved are thrown away and drawn again.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from actfocus_jax.envs import grid

_TURN_PROBABILITY = 0.35
# Cells of each mask, (row, column) from its middle.
_MASKS = (
  ((0, -1), (0, 0), (0, 1)),
  ((-1, 0), (0, 0), (1, 0)),
  ((0, -1), (0, 0), (1, 0)),
  ((0, -1), (0, 0), (1, -1), (1, 0)),
  ((0, 0), (0, 1), (1, 0)),
)
# The closing walk is likelier where the box is only one push from its target.
_WALK_PROBABILITY = 0.5
_WALK_PROBABILITY_NEAR = 0.8
_WALK_ON_PROBABILITY = 0.5
_WALK_LENGTH = 3
# One box in 6 x 6 cells has at most 240 states; more boxes have far too many to
# visit, and the best of the first 10,000 is far enough from the targets.
_MAX_STATES = 10_000
_MAX_DRAWS = 1_000


@dataclasses.dataclass(frozen=True)
class Level:
  """A generated room; `boxes[i]` was pulled away from `targets[i]`."""

  floor: frozenset[grid.Cell]
  player: grid.Cell
  targets: tuple[grid.Cell, ...]
  boxes: tuple[grid.Cell, ...]


def generate(
  seed: int,
  *,
  rows: int,
  cols: int,
  boxes: int,
  search_depth: int,
  walk_steps: int,
) -> Level:
  """Generate a room that can be solved and is not solved yet.

  `search_depth` is the longest reverse play in moves, `walk_steps` the steps
  of the walk that digs the floor; rows and columns include the border.

  Raises:
    RuntimeError: no room found; there is too little floor for the boxes.
  """
  rng = np.random.default_rng(seed)
  for _ in range(_MAX_DRAWS):
    floor = _dig(rng, rows, cols, walk_steps)
    if len(floor) <= boxes + 1:
      continue
    player, *targets = _draw_cells(rng, floor, boxes + 1)
    start = Level(floor, player, tuple(targets), tuple(targets))
    level = _play_backwards(start, search_depth)
    if _displacement(level) > 0:
      return _walk_away(rng, level)
  raise RuntimeError(
    f'no room of {rows} x {cols} cells with {boxes} boxes in {_MAX_DRAWS} draws'
  )


def _dig(
  rng: np.random.Generator, rows: int, cols: int, walk_steps: int
) -> frozenset[grid.Cell]:
  moves = tuple(grid.MOVES.values())
  move = moves[rng.integers(4)]
  row, col = int(rng.integers(1, rows)), int(rng.integers(1, cols))
  floor = set()
  for _ in range(walk_steps):
    if rng.random() < _TURN_PROBABILITY:
      move = moves[rng.integers(4)]
    row = min(max(row + move[0], 1), rows - 2)
    col = min(max(col + move[1], 1), cols - 2)
    mask = _MASKS[rng.integers(len(_MASKS))]
    floor.update((row + r, col + c) for r, c in mask)
  return frozenset(
    (r, c) for r, c in floor if 0 < r < rows - 1 and 0 < c < cols - 1
  )


def _draw_cells(
  rng: np.random.Generator, floor: frozenset[grid.Cell], count: int
) -> list[grid.Cell]:
  # Sorted, because the order of a set must not decide which room a seed gives.
  cells = sorted(floor)
  return [cells[i] for i in rng.choice(len(cells), size=count, replace=False)]


def _play_backwards(start: Level, search_depth: int) -> Level:
  best, best_score = start, 0
  seen, stack = set(), [(start, search_depth)]
  while stack and len(seen) < _MAX_STATES:
    level, depth = stack.pop()
    if (level.player, level.boxes) in seen:
      continue
    seen.add((level.player, level.boxes))
    score = _displacement(level)
    on_targets = {level.player, *level.boxes} & set(level.targets)
    if score > best_score and not on_targets:
      best, best_score = level, score
    if depth > 0:
      # Reversed, so that the first action is the first to be popped.
      following = reversed(list(_pulls(level)))
      stack.extend((next_level, depth - 1) for next_level in following)
  return best


def _pulls(level: Level) -> Iterator[Level]:
  for action, move in grid.MOVES.items():
    ahead = grid.neighbour(level.player, action)
    if ahead not in level.floor or ahead in level.boxes:
      continue
    behind = level.player[0] - move[0], level.player[1] - move[1]
    boxes = tuple(level.player if box == behind else box for box in level.boxes)
    yield Level(level.floor, ahead, level.targets, boxes)


def _displacement(level: Level) -> int:
  pairs = zip(level.boxes, level.targets, strict=True)
  return sum(grid.distance(box, target) for box, target in pairs)


def _walk_away(rng: np.random.Generator, level: Level) -> Level:
  near = _displacement(level) == 1
  if rng.random() > (_WALK_PROBABILITY_NEAR if near else _WALK_PROBABILITY):
    return level
  walked = [level.player]
  for _ in range(_WALK_LENGTH):
    free = [
      cell
      for cell in (grid.neighbour(walked[-1], action) for action in grid.MOVES)
      if cell in level.floor and cell not in (*level.boxes, *walked)
    ]
    if not free:
      break
    walked.append(free[rng.integers(len(free))])
    if rng.random() > _WALK_ON_PROBABILITY:
      break
  return dataclasses.replace(level, player=walked[-1])
