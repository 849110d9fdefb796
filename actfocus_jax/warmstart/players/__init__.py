"""Scripted players, good but not perfect: they write the demonstrations.

A player answers as the model should: a short, regular thought that describes
the board correctly, then one or two actions. From it a model learns to write
the format and to read the board. The actions are good only with probability
`skill`, so reinforcement learning has something to improve.
"""

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from actfocus_jax import envs
from actfocus_jax.envs import base, boards
from actfocus_jax.rollout import env_pool
from actfocus_jax.warmstart.players import (
  frozen_lake,
  sokoban,
  sudoku,
  uniform,
  webshop,
)


class Player(Protocol):
  """A policy that is written by hand."""

  def respond(
    self, env: base.Environment, state: base.State, rng: np.random.Generator
  ) -> tuple[str, list[str]]:
    """Return the thought and the actions of one turn."""
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


def random_player(env: base.Environment) -> Player | None:
  """Return the player of uniformly random actions, or None if there is none."""
  if env.actions:
    return FOR_ALL['random']
  kind = type(env.env if isinstance(env, boards.OnBoards) else env)
  name = next((name for name, known in envs.ENVS.items() if known is kind), '')
  return PLAYERS.get(name, {}).get('random')


def play(
  env: base.Environment,
  player: Player,
  seeds: Sequence[int],
  *,
  pool: env_pool.EnvPool,
  turns: int,
  max_actions: int,
  budget: int,
  repeat: int = 0,
) -> list[bool] | env_pool.Failed:
  """Play one episode per seed, all of them turn by turn in lockstep.

  Each reset and each turn is one call of the pool, so its time limit holds for
  a turn and not for an episode.

  Args:
    env: the environment.
    player: the player.
    seeds: seeds of the boards.
    pool: runs the environment.
    turns: most turns of an episode.
    max_actions: most actions of a turn.
    budget: most actions of an episode.
    repeat: number of the repetition; each draws other actions.

  Returns:
    Success of each episode, or the failure that ended them all.
  """
  # Apart from the streams with which environments make boards and slips.
  rngs = [
    np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, repeat)))
    for seed in seeds
  ]
  seen = pool.run([functools.partial(base.reset, env, seed) for seed in seeds])
  solved, left = [False] * len(seen), [budget] * len(seen)
  if failure := _failure(seen):
    return failure
  live = list(range(len(seen)))
  for _ in range(turns):
    calls = [
      functools.partial(
        base.play_turn,
        env,
        *seen[i],
        player.respond(env, seen[i][0], rngs[i])[1],
        budget=left[i],
        max_actions=max_actions,
      )
      for i in live
    ]
    outcomes = pool.run(calls)
    if failure := _failure(outcomes):
      return failure
    for i, (state, turn) in zip(live, outcomes, strict=True):
      seen[i] = state, turn.text
      solved[i] |= turn.success
      left[i] = 0 if turn.done else left[i] - turn.actions_used
    live = [i for i in live if left[i]]
  return solved


def _failure(outcomes) -> env_pool.Failed | None:
  failures = (x for x in outcomes if isinstance(x, env_pool.Failed))
  return next(failures, None)
