"""FrozenLake: walk over slippery ice to the goal without falling into a hole.

One step:

1. The action names a direction.
2. The ice may turn it: the intended direction with `success_probability`, each
   perpendicular one with half of the rest. A random number decides which; it
   depends on the seed and the number of actions taken before. The members of a
   group share the seed, so they meet the same ice wherever they go.
3. The player moves, or stays if the grid ends there.
4. On the goal: reward 1, done, success. In a hole: reward 0, done.

Presets of `success_probability`: 1.0 deterministic, 0.8 slippery (default), 1/3
the ice of gymnasium's FrozenLake-v1.
"""

import dataclasses

import numpy as np

from actfocus_jax.envs import base, grid

# Neighbours in this cycle are perpendicular, which is all that slipping needs.
ACTIONS = ('Left', 'Down', 'Right', 'Up')
_MAX_DRAWS = 10_000

_INSTRUCTIONS = """\
You play FrozenLake. Walk over the ice to the goal and do not fall into a hole.
Symbols: P you, _ ice, O hole, G goal, X you in a hole, √ you on the goal.
Cells are given as (row, column), counted from 0 at the top left.
{ice}
You get 1 for reaching the goal and 0 otherwise.
Actions: Left, Down, Right, Up."""
_FIRM = 'Each action moves you one cell that way.'
_SLIPPERY = (
  'The ice is slippery: an action may move you sideways instead of where you '
  'meant to go.'
)


@dataclasses.dataclass(frozen=True)
class Lake:
  """The constant part: the size, the start, the goal, the holes."""

  rows: int
  cols: int
  start: grid.Cell
  goal: grid.Cell
  holes: frozenset[grid.Cell]


@dataclasses.dataclass(frozen=True)
class State:
  """Cell of the player, and the position in the noise stream."""

  lake: Lake
  player: grid.Cell
  seed: int
  actions_taken: int


class FrozenLake:
  """The environment; see the module's docstring for its dynamics."""

  actions = ACTIONS

  def __init__(
    self,
    *,
    size: int | tuple[int, int] = 4,
    frozen_probability: float = 0.9,
    success_probability: float = 0.8,
    instructions: str | None = None,
  ):
    """Fix the kind of lake; configs/README.md explains the fields."""
    rows, cols = (size, size) if isinstance(size, int) else size
    if min(rows, cols) < 1 or rows * cols < 2:
      raise ValueError(f'size needs at least two cells, got {size}')
    if not 0.0 < frozen_probability <= 1.0:
      raise ValueError(
        f'frozen_probability must be in (0, 1], got {frozen_probability}'
      )
    if not 0.0 <= success_probability <= 1.0:
      raise ValueError(
        f'success_probability must be in [0, 1], got {success_probability}'
      )
    self.rows, self.cols = rows, cols
    self.frozen_probability = frozen_probability
    self.success_probability = success_probability
    ice = _FIRM if success_probability == 1.0 else _SLIPPERY
    default = _INSTRUCTIONS.format(ice=ice)
    self.instructions = default if instructions is None else instructions

  def reset(self, seed: int) -> tuple[State, str]:
    """Draw a lake whose goal can be reached.

    Raises:
      RuntimeError: no such lake found; frozen_probability is too small.
    """
    rng = _generator(seed, 0)
    for _ in range(_MAX_DRAWS):
      lake = self._draw(rng)
      state = State(lake, lake.start, seed, actions_taken=0)
      if shortest_path(state) is not None:
        return state, self.render(state)
    raise RuntimeError(
      f'no lake with a way to the goal in {_MAX_DRAWS} draws; '
      f'frozen_probability {self.frozen_probability} is too small'
    )

  def load(self, board: str, *, seed: int = 0) -> tuple[State, str]:
    """Read a lake.

    Args:
      board: rows of S (start), F (ice), H (hole) and G (goal).
      seed: fixes the ice.

    Raises:
      ValueError: not a rectangle of these letters with one S and one G.
    """
    cells = grid.parse(board, 'SFHG')
    starts, goals = grid.cells_of(cells, 'S'), grid.cells_of(cells, 'G')
    if len(starts) != 1 or len(goals) != 1:
      raise ValueError(
        f'a lake has one S and one G, got {len(starts)} and {len(goals)}'
      )
    rows, cols = (1 + max(axis) for axis in zip(*cells, strict=True))
    holes = frozenset(grid.cells_of(cells, 'H'))
    lake = Lake(rows, cols, starts[0], goals[0], holes)
    state = State(lake, lake.start, seed, actions_taken=0)
    return state, self.render(state)

  def is_unsolvable(self, state: State) -> bool:
    """Return whether there is no way to the goal."""
    return shortest_path(state) is None

  def transitions(
    self, state: State, action: str
  ) -> list[tuple[float, grid.Cell]]:
    """Return (probability, cell) of the intended and both perpendicular moves.

    The three probabilities add up to 1; cells may repeat at the border.
    """
    index = ACTIONS.index(base.require_action(ACTIONS, action))
    slip = (1.0 - self.success_probability) / 2.0
    return [
      (probability, slide(state.lake, state.player, ACTIONS[turned % 4]))
      for turned, probability in (
        (index, self.success_probability),
        (index - 1, slip),
        (index + 1, slip),
      )
    ]

  def step(self, state: State, action: str) -> tuple[State, base.Step]:
    """Run one action. A state that is done stays as it is, with reward 0."""
    outcomes = self.transitions(state, action)
    was_done = is_done(state)
    rng = _generator(state.seed, 1, state.actions_taken)
    player = state.player if was_done else _pick(outcomes, rng.random())
    following = dataclasses.replace(
      state, player=player, actions_taken=state.actions_taken + 1
    )
    success = player == state.lake.goal
    return following, base.Step(
      text=self.render(following),
      reward=1.0 if success and not was_done else 0.0,
      done=is_done(following),
      success=success,
      info={'effective': player != state.player},
    )

  def render(self, state: State) -> str:
    """Write the coordinates, then the map; no trailing blanks."""
    lake = state.lake
    place = ' on goal' if state.player == lake.goal else ''
    place = ' in hole' if state.player in lake.holes else place
    lines = [
      'Coordinates:',
      f'Board size: {lake.rows} rows x {lake.cols} cols (zero-indexed).',
      f'Start: {lake.start}',
      f'Goal: {lake.goal}',
      f'Player{place}: {state.player}',
    ]
    if lake.holes:
      holes = ', '.join(str(cell) for cell in sorted(lake.holes))
      lines.append(f'Holes: {holes}')
    lines.append('Grid Map:')
    for row in range(lake.rows):
      cells = ((row, col) for col in range(lake.cols))
      lines.append(''.join(_symbol(state, cell) for cell in cells))
    return '\n'.join(lines)

  def _draw(self, rng: np.random.Generator) -> Lake:
    rows, cols = self.rows, self.cols
    frozen = rng.random((rows, cols)) < self.frozen_probability
    ends = rng.choice(rows * cols, size=2, replace=False)
    start, goal = (divmod(int(end), cols) for end in ends)
    holes = {(int(r), int(c)) for r, c in np.argwhere(~frozen)}
    return Lake(rows, cols, start, goal, frozenset(holes - {start, goal}))


def is_done(state: State) -> bool:
  """Return whether the player is on the goal or in a hole."""
  return state.player == state.lake.goal or state.player in state.lake.holes


def slide(lake: Lake, cell: grid.Cell, action: str) -> grid.Cell:
  """Return the cell where a move ends if the ice does not turn it."""
  row, col = grid.neighbour(cell, action)
  is_inside = 0 <= row < lake.rows and 0 <= col < lake.cols
  return (row, col) if is_inside else cell


def shortest_path(state: State) -> list[str] | None:
  """Return the fewest actions to the goal around all holes, on firm ice.

  None if the goal cannot be reached. The player may stand anywhere.
  """
  lake = state.lake

  def successors(cell):
    for action in ACTIONS:
      following = slide(lake, cell, action)
      if following not in lake.holes:
        yield action, following

  return grid.shortest_path(
    state.player, successors, lambda cell: cell == lake.goal
  )


def _generator(seed: int, *stream: int) -> np.random.Generator:
  # A spawn key keeps the streams apart. A list (seed, stream) would not: zeros
  # at the end of a list do not change the seed.
  return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _pick(outcomes: list[tuple[float, grid.Cell]], uniform: float) -> grid.Cell:
  for probability, cell in outcomes:
    if uniform < probability:
      return cell
    uniform -= probability
  # The probabilities add up to 1 only up to rounding.
  return outcomes[-1][1]


def _symbol(state: State, cell: grid.Cell) -> str:
  is_player = cell == state.player
  if cell == state.lake.goal:
    return '√' if is_player else 'G'
  if cell in state.lake.holes:
    return 'X' if is_player else 'O'
  return 'P' if is_player else '_'
