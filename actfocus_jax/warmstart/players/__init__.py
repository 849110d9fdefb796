"""Scripted players, good but not perfect: what a warm start learns from.

A player answers like the model should: a short, regular thought that describes
the board correctly, then one or two actions. What a model learns from it is to
write the format and to read the board. The actions are good only with
probability `skill`, which leaves something to be learned by reinforcement.
"""

import functools
import itertools
from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol

import numpy as np

from actfocus_jax.envs import base
from actfocus_jax.warmstart.players import (
  frozen_lake,
  sokoban,
  sudoku,
  uniform,
  webshop,
)


class Player(Protocol):
  """Something that answers a state."""

  def respond(
    self, env: base.Environment, state: base.State, rng: np.random.Generator
  ) -> tuple[str, list[str]]:
    """Returns the thought and the actions of one turn."""
    ...


FOR_ALL = {'random': uniform.Uniform()}
PLAYERS = {
  'frozen_lake': {
    'careless': frozen_lake.FrozenLakeCareless(),
    'careful': frozen_lake.FrozenLakeCareful(skill=0.8),
    'random': frozen_lake.FrozenLakeCareless(skill=0.0),
  },
  'sokoban': {
    'careless': sokoban.SokobanCareless(),
    'random': sokoban.SokobanCareless(skill=0.0),
  },
  'sudoku': {
    'careless': sudoku.SudokuCareless(),
    'orderly': sudoku.SudokuOrderly(skill=0.4, habit=0.4),
    'random': sudoku.SudokuCareless(skill=0.0),
  },
  'webshop': {
    'careless': webshop.WebShopCareless(),
    'careful': webshop.WebShopCareful(),
    'random': webshop.WebShopCareless(skill=0.0),
  },
}


# An environment's part of an episode, and what came of it.
Calls = Generator[Callable[[], Any], Any, bool]


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
  return success_rate(
    env,
    FOR_ALL['random'],
    seeds,
    turns=actions,
    max_actions=1,
    budget=actions,
    plays=plays,
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
  limits = dict(turns=turns, max_actions=max_actions, budget=budget)
  episodes = [
    episode(env, player, seed, play=play, **limits)
    for seed, play in itertools.product(seeds, range(plays))
  ]
  return float(np.mean([_run(calls) for calls in episodes]))


def episode(
  env: base.Environment,
  player: Player,
  seed: int,
  *,
  turns: int,
  max_actions: int,
  budget: int,
  play: int = 0,
) -> Calls:
  """One episode of a player, for somebody else to make the calls of.

  Args:
    env: the environment.
    player: the player.
    seed: of the board.
    turns: most turns.
    max_actions: most actions of a turn.
    budget: most actions of the episode.
    play: which of the player's episodes on this board.

  Yields:
    The reset and then each turn, as a call without arguments; what it returned
    is to be sent back.

  Returns:
    Whether the environment was solved.
  """
  rng = _generator(seed, play)
  state, text = yield functools.partial(base.reset, env, seed)
  solved = False
  for _ in range(turns):
    _, answer = player.respond(env, state, rng)
    state, played = yield functools.partial(
      base.play_turn,
      env,
      state,
      text,
      answer,
      budget=budget,
      max_actions=max_actions,
    )
    solved = solved or played.success
    budget, text = budget - played.actions_used, played.text
    if played.done or budget == 0:
      break
  return solved


def _run(calls: Calls) -> bool:
  """Makes every call at once."""
  try:
    call = next(calls)
    while True:
      call = calls.send(call())
  except StopIteration as end:
    return end.value


def _generator(seed: int, play: int = 0) -> np.random.Generator:
  # Apart from the streams with which environments make boards and slips.
  return np.random.default_rng(
    np.random.SeedSequence(seed, spawn_key=(2, play))
  )
