"""Held-out success: the same boards every time, with a 95 % interval."""

import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from actfocus_jax import build
from actfocus_jax.parallel import processes
from actfocus_jax.report import intervals
from actfocus_jax.rollout import collector as collector_lib
from actfocus_jax.rollout import episode
from actfocus_jax.rollout import statistics as statistics_lib


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
  """Plays the held-out boards of every game.

  Args:
    collector: Of the environment.
    policy: Who plays.
    key: The same at every evaluation of a run, so that two policies differ by
      what they learned and not by their dice.
    prompts: Boards of each game, with the seeds first_seed, first_seed + 1...
    members: Episodes on each board.
    temperature: Of sampling.
    first_seed: Of the boards.

  Returns:
    A row of eval.jsonl without its step, and the episodes. `success_low` and
    `success_high` bound the 95 % Wilson interval; episodes on one board are
    counted as independent. Of several games it is about all their episodes,
    and has the numbers of each as `NAME/success` and so on.
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
  """The numbers of some episodes."""
  solved = np.array([one.success for one in played.episodes])
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


def evaluate_checkpoint(
  c: ml_collections.ConfigDict, workdir: pathlib.Path | None, step: int | None
) -> tuple[int, dict[str, float]]:
  """Evaluates a checkpoint of a run, or the model that a config starts from.

  Args:
    c: The config; its eval section says how.
    workdir: The run; None evaluates the model itself, as step 0.
    step: Of the checkpoint; None is the newest.

  Returns:
    The step, and the row of `evaluate`.

  Raises:
    UsageError: When there is no such checkpoint, or not all processes mean it.
  """
  # Else each would read its slices from the checkpoint that it means.
  for flag, value in (
    ('--workdir', workdir and str(workdir)),
    ('--step', step),
  ):
    processes.check_equal(value, flag, 'the same in all processes')
  with build.parts(c) as parts:
    if workdir is None:
      build.same_model(parts.model)
      step, params = 0, parts.model.weights()
    else:
      step, params = build.checkpoint(parts.model, workdir, step)
    row, _ = evaluate(
      parts.collector,
      build.policy(parts.model, params),
      evaluation_key(c),
      **evaluation_arguments(c),
    )
  return step, row


def evaluation_key(c: ml_collections.ConfigDict) -> jax.Array:
  """The key of every evaluation of a run."""
  return jax.random.fold_in(jax.random.key(c.seed), build.EVALUATION)


def evaluation_arguments(c: ml_collections.ConfigDict) -> dict[str, Any]:
  """The keyword arguments of `evaluate`."""
  names = ('prompts', 'members', 'temperature', 'first_seed')
  return {name: c.eval[name] for name in names}


def line(step: int, row: dict[str, float]) -> str:
  """One evaluation as people read it."""
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
  parts: build.Parts,
  explain,
  *,
  step,
  count,
  length,
) -> list[dict[str, Any]]:
  """Some episodes for the viewer: one of each group first, then the others.

  Args:
    played: The episodes.
    parts: Of the run.
    explain: (batch) -> (signal_BT, weight_BT).
    step: Of the evaluation.
    count: How many.
    length: To which they are padded.

  Returns:
    Records as `statistics_lib.viewer_record` makes them.
  """
  members = played.groups.count(0)
  order = sorted(range(len(played.episodes)), key=lambda row: row % members)
  rows = order[:count]
  shown = [played.episodes[row] for row in rows]
  groups = [played.groups[row] for row in rows]
  batch = episode.to_trajectory(
    shown, groups, length=length, pad=parts.chat.pad_id
  )
  signal_BT, weight_BT = jax.device_get(explain(batch))
  return [
    statistics_lib.viewer_record(
      one,
      parts.chat,
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
