"""Scripted players, good but not perfect: what a warm start learns from.

A player answers like the model should: a short, regular thought that describes
the board correctly, then one or two actions. What a model learns from it is to
write the format and to read the board. The actions are good only with
probability `skill`, which leaves something to be learned by reinforcement.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from actfocus_jax.envs import (
  base,
  frozen_lake,
  grid,
  sokoban,
  sudoku_player,
  webshop_player,
)


class Player(Protocol):
  """Something that answers a state."""

  def respond(
    self, env: base.Environment, state: base.State, rng: np.random.Generator
  ) -> tuple[str, list[str]]:
    """Returns the thought and the actions of one turn."""
    ...


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
    """Returns e.g. `I am at (1, 3), the goal is at (2, 0): 1 down, 3 left.`.

    The second action starts from where the first leads on firm ice; if that is
    the goal there is no second one.
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
      return _draw(rng, self._good_actions(state) or env.actions)
    if luck < self.skill + self.habit:
      return 'Up'
    return _draw(rng, env.actions)

  def _good_actions(self, state: frozen_lake.State) -> tuple[str, ...]:
    return tuple(way for way, _ in _ways(state.player, state.lake.goal))


@dataclasses.dataclass(frozen=True)
class FrozenLakeCareful(FrozenLakeCareless):
  """Follows a shortest path around the holes with probability `skill`."""

  def _good_actions(self, state: frozen_lake.State) -> tuple[str, ...]:
    return tuple((frozen_lake.shortest_path(state) or ())[:1])


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
      actions.append(_draw(rng, solution[:1] if solution else env.actions))
      here = sokoban.push(here, actions[-1])
    return _sokoban_thought(state), actions


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Takes any action of the table; of an environment that nobody knows."""

  def respond(
    self, env: base.Environment, state: base.State, rng: np.random.Generator
  ) -> tuple[str, list[str]]:
    """Returns e.g. `I try Left.` and the action."""
    del state
    if not env.actions:
      raise ValueError(
        'The player random needs an environment with a table of actions; name '
        "one of your own, player.name='package.module:Class'."
      )
    action = _draw(rng, env.actions)
    return f'I try {action}.', [action]


FOR_ALL = {'random': Uniform()}
PLAYERS = {
  'frozen_lake': {
    'careless': FrozenLakeCareless(),
    'careful': FrozenLakeCareful(skill=0.8),
    'random': FrozenLakeCareless(skill=0.0),
  },
  'sokoban': {
    'careless': SokobanCareless(),
    'random': SokobanCareless(skill=0.0),
  },
  'sudoku': {
    'careless': sudoku_player.SudokuCareless(),
    'random': sudoku_player.SudokuCareless(skill=0.0),
  },
  'webshop': {
    'careless': webshop_player.WebShopCareless(),
    'careful': webshop_player.WebShopCareful(),
    'random': webshop_player.WebShopCareless(skill=0.0),
  },
}


def random_play_success(
  env: base.Environment,
  seeds: Iterable[int],
  *,
  actions: int = 10,
  plays: int = 1,
) -> float:
  """Returns the chance level: how often uniformly random actions succeed.

  Args:
    env: an environment with a table of action names.
    seeds: one board each.
    actions: actions per episode, all of them played unless it ends before.
    plays: episodes on each board, with different actions.

  Returns:
    Share of the episodes that succeeded.
  """
  return float(
    np.mean(
      [
        _random_episode(env, seed, actions, play)
        for seed in seeds
        for play in range(plays)
      ]
    )
  )


def success_rate(
  env: base.Environment,
  player: Player,
  seeds: Iterable[int],
  *,
  turns: int = 5,
  max_actions: int = 2,
  budget: int = 10,
  plays: int = 1,
) -> float:
  """Returns how often a player succeeds, under the rules of a turn.

  Args:
    env: the environment.
    player: the player.
    seeds: one episode each; a seed fixes the board and the play.
    turns: most turns of an episode.
    max_actions: most actions of a turn.
    budget: most actions of an episode.
    plays: episodes on each board, with different choices of the player.

  Returns:
    Share of the episodes that succeeded.
  """
  results = []
  for seed, play in itertools.product(seeds, range(plays)):
    rng = _generator(seed, play)
    state, text = env.reset(seed)
    left, played = budget, None
    for _ in range(turns):
      _, answer = player.respond(env, state, rng)
      state, played = base.play_turn(
        env, state, text, answer, budget=left, max_actions=max_actions
      )
      left, text = left - played.actions_used, played.text
      if played.done or left == 0:
        break
    results.append(played.success)
  return float(np.mean(results))


def _random_episode(
  env: base.Environment, seed: int, actions: int, play: int
) -> bool:
  rng = _generator(seed, play)
  state, _ = env.reset(seed)
  for _ in range(actions):
    state, step = env.step(state, _draw(rng, env.actions))
    if step.done:
      return step.success
  return False


def _generator(seed: int, play: int = 0) -> np.random.Generator:
  # Apart from the streams with which environments make boards and slips.
  return np.random.default_rng(
    np.random.SeedSequence(seed, spawn_key=(2, play))
  )


def _draw(rng: np.random.Generator, actions: Iterable[str]) -> str:
  actions = tuple(actions)
  return actions[rng.integers(len(actions))]


def _ways(cell: grid.Cell, goal: grid.Cell) -> list[tuple[str, int]]:
  """Returns the directions that come closer to the goal, with the distances."""
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


def _sokoban_thought(state: sokoban.State) -> str:
  boxes = _at('box', 'boxes', state.boxes)
  targets = _at('target', 'targets', state.room.targets)
  return f'I am at {state.player}, the {boxes}, the {targets}.'


def _at(one: str, many: str, cells: frozenset[grid.Cell]) -> str:
  places = ' and '.join(str(cell) for cell in sorted(cells))
  return f'{one if len(cells) == 1 else many} at {places}'
