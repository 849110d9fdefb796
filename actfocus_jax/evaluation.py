"""Held-out success: the same boards every time, with a 95 % interval."""

import json
import pathlib

import jax
import numpy as np

from actfocus_jax.agent import records, rollout
from actfocus_jax.report import intervals


def evaluate(
  collector: rollout.Collector,
  policy: rollout.Policy,
  key: jax.Array,
  *,
  prompts: int,
  members: int,
  temperature: float,
  first_seed: int,
) -> tuple[dict[str, float], rollout.Rollout]:
  """Plays the held-out boards.

  Args:
    collector: Of the environment.
    policy: Who plays.
    key: The same at every evaluation of a run, so that two policies differ by
      what they learned and not by their dice.
    prompts: Boards, with the seeds first_seed, first_seed + 1, ...
    members: Episodes on each board.
    temperature: Of sampling.
    first_seed: Of the boards.

  Returns:
    A row of eval.jsonl without its step, and the episodes. `success_low` and
    `success_high` bound the 95 % Wilson interval; episodes on one board are
    counted as independent.
  """
  seeds = range(first_seed, first_seed + prompts)
  played = collector.collect(
    policy, seeds, key, members=members, temperature=temperature
  )
  solved = np.array([episode.success for episode in played.episodes])
  low, high = intervals.wilson(int(solved.sum()), solved.size)
  row = records.statistics(played)
  success = row.pop('success')
  head = {
    'success': success,
    'success_low': low,
    'success_high': high,
    'pass_at_g': row.pop('pass_at_g'),
    'episodes': int(solved.size),
    'seconds': played.seconds,
  }
  return head | row, played


def save_episodes(
  path: pathlib.Path, played: rollout.Rollout, chat, *, step: int, count: int
):
  """Writes the first member of each of the first `count` groups, then others.

  Args:
    path: A .jsonl file; its folder is made.
    played: The episodes.
    chat: The tokenizer bridge.
    step: Of the evaluation.
    count: How many episodes.
  """
  members = played.groups.count(0)
  rows = [
    (member, group * members + member)
    for member in range(members)
    for group in range(len(played.episodes) // members)
  ]
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w') as file:
    for member, row in rows[:count]:
      record = records.to_json(
        played.episodes[row],
        chat,
        step=step,
        group=played.groups[row],
        member=member,
      )
      file.write(json.dumps(record) + '\n')
