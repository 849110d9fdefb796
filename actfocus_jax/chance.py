"""The chance level: how often random play solves the held-out boards.

A board is played several times, one time after the other; the boards of one
time go on together, so that their environments run at the same time, and each
reset and each turn is a call that the time limit holds for.
"""

from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from actfocus_jax import envs
from actfocus_jax.envs import boards
from actfocus_jax.rollout import env_pool as env_pool_lib
from actfocus_jax.rollout import games as games_lib
from actfocus_jax.warmstart import players

_PLAYS = 16  # on each board


def level(c: ml_collections.ConfigDict, collector) -> dict[str, float | None]:
  """Plays at random.

  Args:
    c: The config.
    collector: Of the run.

  Returns:
    The row of baselines.json; `random_success` is None where a game has no
    table of actions and no player that plays at random, or fails, which is
    printed. Of several games it is the mean, and `NAME/random_success` that of
    each.
  """
  seeds = range(c.eval.first_seed, c.eval.first_seed + c.eval.prompts)
  rates = [_rate(collector.pool, game, seeds) for game in collector.games]
  row = {
    'random_success': None if None in rates else float(np.mean(rates)),
    'random_episodes': _PLAYS * len(seeds) * len(rates),
  }
  if len(rates) > 1:
    for game, rate in zip(collector.games, rates, strict=True):
      row[f'{game.name}/random_success'] = rate
  return row


def _rate(
  pool: env_pool_lib.EnvPool, game: games_lib.Game, seeds: range
) -> float | None:
  """How often a game is solved, or None."""
  cast = _cast(game)
  if cast is None:
    return None
  player, limits = cast
  solved = []
  for play in range(_PLAYS):
    episodes = [
      players.episode(game.env, player, seed, play=play, **limits)
      for seed in seeds
    ]
    found = _in_lockstep(pool, episodes)
    if isinstance(found, env_pool_lib.Failed):
      print(
        f'No chance level of {game.name}: the environment failed, '
        f'{found.reason}'
      )
      return None
    solved += found
  return float(np.mean(solved))


def _cast(game: games_lib.Game) -> tuple[players.Player, dict[str, Any]] | None:
  """Who plays a game at random, and within which limits."""
  limits = game.limits
  budget = min(limits.action_budget, limits.turns * limits.max_actions)
  if game.env.actions:  # One action at a time: turns make no difference.
    player = players.FOR_ALL['random']
    return player, dict(turns=budget, max_actions=1, budget=budget)
  env = game.env.env if isinstance(game.env, boards.OnBoards) else game.env
  known = (name for name, made in envs.ENVS.items() if type(env) is made)
  player = players.PLAYERS.get(next(known, ''), {}).get('random')
  if player is None:
    return None
  return player, dict(
    turns=limits.turns, max_actions=limits.max_actions, budget=budget
  )


def _in_lockstep(
  pool: env_pool_lib.EnvPool, episodes: Sequence[players.Calls]
) -> list[bool] | env_pool_lib.Failed:
  """Makes the calls of all episodes, the first of each, the second, ..."""
  solved = [False] * len(episodes)
  calls = {i: next(episode) for i, episode in enumerate(episodes)}
  while calls:
    outcomes = pool.run(list(calls.values()))
    for outcome in outcomes:
      if isinstance(outcome, env_pool_lib.Failed):
        return outcome
    following = {}
    for i, outcome in zip(calls, outcomes, strict=True):
      try:
        following[i] = episodes[i].send(outcome)
      except StopIteration as end:
        solved[i] = end.value
    calls = following
  return solved
