"""Held-out success: the same boards every time, with a 95 % interval.

Beside it stands the random baseline: the success of uniformly random play on
the same boards.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from actfocus_jax.report import intervals
from actfocus_jax.rollout import collector as collector_lib
from actfocus_jax.rollout import env_pool, episode, games
from actfocus_jax.rollout import statistics as statistics_lib
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.warmstart import players

_RANDOM_PLAYS = 16  # episodes of the random baseline on each board


def evaluate(
  collector: collector_lib.Collector,
  policy: collector_lib.Policy,
  key: jax.Array,
  *,
  prompts: int,
  members: int,
  temperature: float,
  first_seed: int,
) -> tuple[dict[str, float], collector_lib.Rollout]:
  """Play the held-out boards of every game.

  Args:
    collector: collector of rollouts.
    policy: policy that plays.
    key: PRNG key, the same at every evaluation of a run, so that two policies
      differ by their weights and not by their random numbers.
    prompts: boards of each game, with the seeds first_seed, first_seed + 1...
    members: episodes on each board.
    temperature: temperature of sampling.
    first_seed: seed of the first board.

  Returns:
    A row of eval.jsonl without its step, and the episodes. `success_low` and
    `success_high` bound the 95 % Wilson interval, which counts the episodes on
    one board as independent. With several games the row is of all episodes, and
    has the numbers of each game as `NAME/success` and so on.
  """
  seeds = range(first_seed, first_seed + prompts)
  parts = [
    collector.collect(
      policy, seeds, key, members=members, temperature=temperature, game=game
    )
    for game in collector.games
  ]
  played = collector_lib.concatenate(parts)
  row = _row(played)
  if len(parts) > 1:
    for game, part in zip(collector.games, parts, strict=True):
      row |= {f'{game.name}/{k}': v for k, v in _row(part).items()}
  return row, played


def _row(played: collector_lib.Rollout) -> dict[str, float]:
  """Means over some episodes."""
  solved = np.array([episode.success for episode in played.episodes])
  low, high = intervals.wilson(int(solved.sum()), solved.size)
  row = statistics_lib.episode_means(played)
  head = {
    'success': row.pop('success'),
    'success_low': low,
    'success_high': high,
    'pass_at_g': row.pop('pass_at_g'),
    'episodes': int(solved.size),
    'seconds': played.seconds,
  }
  return head | row


def line(step: int, row: dict[str, float]) -> str:
  """Sentence about one evaluation."""
  text = (
    f'step {step}: held-out success {row["success"]:.1%} '
    f'(95 % interval {row["success_low"]:.1%} to {row["success_high"]:.1%}), '
    f'pass@G {row["pass_at_g"]:.1%}, {row["episodes"]} episodes'
  )
  if 'info/bought' in row:
    text += f', purchase rate {row["info/bought"]:.1%}'
  if row.get('failed'):
    text += f'; the environment failed in {row["failed"]:.1%} of them'
  games = [k.removesuffix('/success') for k in row if k.endswith('/success')]
  of_games = [f'{name} {row[f"{name}/success"]:.1%}' for name in games]
  return '; '.join([text, ', '.join(of_games)] if of_games else [text])


def episodes_to_show(
  played: collector_lib.Rollout,
  chat: chat_lib.Chat,
  explain,
  *,
  step,
  count,
  length,
) -> list[dict[str, Any]]:
  """Records of some episodes for the viewer, one of each group first.

  Args:
    played: the episodes.
    chat: tokenizer bridge.
    explain: (batch) -> (signal_BT, weight_BT).
    step: step of the evaluation.
    count: number of episodes.
    length: length that they are padded to, in tokens.

  Returns:
    Records of `statistics.viewer_record`.
  """
  members = played.groups.count(0)
  order = sorted(range(len(played.episodes)), key=lambda row: row % members)
  rows = order[:count]
  shown = [played.episodes[row] for row in rows]
  groups = [played.groups[row] for row in rows]
  batch = episode.to_trajectory(shown, groups, length=length, pad=chat.pad_id)
  signal_BT, weight_BT = jax.device_get(explain(batch))
  return [
    statistics_lib.viewer_record(
      one,
      chat,
      step=step,
      group=group,
      member=row % members,
      signal_T=signal_T,
      weight_T=weight_T,
    )
    for row, one, group, signal_T, weight_T in zip(
      rows, shown, groups, signal_BT, weight_BT, strict=True
    )
  ]


def random_baseline(
  collector: collector_lib.Collector, seeds: Sequence[int]
) -> dict[str, float | None]:
  """Success of uniformly random play on the held-out boards.

  Args:
    collector: collector of the run; its games are played in its pool.
    seeds: seeds of the boards, each played `_RANDOM_PLAYS` times.

  Returns:
    The row of baselines.json. `random_success` is the mean over the games, and
    `NAME/random_success` that of each if there are several. It is None if the
    environment fails, or has no table of actions and no random player.
  """
  rates = [_random_success(collector.pool, g, seeds) for g in collector.games]
  row = {
    'random_success': None if None in rates else float(np.mean(rates)),
    'random_episodes': _RANDOM_PLAYS * len(seeds) * len(rates),
  }
  if len(rates) > 1:
    for game, rate in zip(collector.games, rates, strict=True):
      row[f'{game.name}/random_success'] = rate
  return row


def _random_success(
  pool: env_pool.EnvPool, game: games.Game, seeds: Sequence[int]
) -> float | None:
  player, limits = players.random_player(game.env), game.limits
  if player is None:
    return None
  turns, max_actions = limits.turns, limits.max_actions
  budget = min(limits.action_budget, turns * max_actions)
  if game.env.actions:  # One action at a time: turns make no difference.
    turns, max_actions = budget, 1
  solved = []
  for repeat in range(_RANDOM_PLAYS):
    outcome = players.play(
      game.env,
      player,
      seeds,
      pool=pool,
      turns=turns,
      max_actions=max_actions,
      budget=budget,
      repeat=repeat,
    )
    if isinstance(outcome, env_pool.Failed):
      print(
        f'No random baseline of {game.name}: the environment failed, '
        f'{outcome.reason}'
      )
      return None
    solved += outcome
  return float(np.mean(solved))
