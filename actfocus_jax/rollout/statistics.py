"""Metrics of finished episodes, and their records for the viewer."""

import dataclasses
from typing import Any

import numpy as np

from actfocus_jax.rollout.collector import Rollout
from actfocus_jax.rollout.episode import Episode


def episode_means(rollout: Rollout) -> dict[str, float]:
  """Return means over the episodes or turns of a rollout.

  Per episode: `success`, `return`, `pass_at_g` (a member of the group
  succeeded), `turns`, `actions`, `tokens`, `truncated` (the context ended it)
  and `failed` (its environment failed). `valid_turns` is the share of turns
  with a valid action, `effective_actions` that of actions that changed
  something. `info/NAME` is the last value of each number in `Step.info`,
  averaged over the episodes of the games that report it, 0 in an episode that
  does not.
  """
  episodes = rollout.episodes
  turns = [turn.result for episode in episodes for turn in episode.turns]
  actions = sum(result.actions_used for result in turns)
  solved: dict[int, bool] = {}
  for group, episode in zip(rollout.groups, episodes, strict=True):
    solved[group] = solved.get(group, False) or episode.success
  return {
    'success': _mean([episode.success for episode in episodes]),
    'return': _mean([episode.episode_return for episode in episodes]),
    'pass_at_g': _mean(list(solved.values())),
    'turns': len(turns) / len(episodes),
    'actions': actions / len(episodes),
    'tokens': _mean([episode.sampled_count for episode in episodes]),
    'valid_turns': _mean([result.valid for result in turns]),
    'effective_actions': (
      sum(result.effective for result in turns) / max(actions, 1)
    ),
    'truncated': _mean([episode.truncated for episode in episodes]),
    'failed': _mean([episode.failure is not None for episode in episodes]),
    **{f'info/{name}': value for name, value in _info_means(episodes).items()},
  }


def _info_means(episodes) -> dict[str, float]:
  """Return the mean of the last value of each number in `Step.info`."""
  last = [
    {k: v for turn in episode.turns for k, v in turn.result.info.items()}
    for episode in episodes
  ]
  names = [episode.game.name for episode in episodes]
  sources: dict[str, set[str]] = {}  # the games that report a number
  for game, info in zip(names, last, strict=True):
    for name in info:
      sources.setdefault(name, set()).add(game)
  return {
    name: _mean(
      [
        info.get(name, 0.0)
        for game, info in zip(names, last, strict=True)
        if game in sources[name]
      ]
    )
    for name in sorted(sources)
  }


def rollouts_by_game(rollout: Rollout) -> dict[str, Rollout]:
  """Return the rollout of each game; work and time are of all games."""
  parts: dict[str, tuple[list, list]] = {}
  for episode, group in zip(rollout.episodes, rollout.groups, strict=True):
    episodes, groups = parts.setdefault(episode.game.name, ([], []))
    episodes.append(episode)
    groups.append(group)
  return {
    name: dataclasses.replace(rollout, episodes=episodes, groups=groups)
    for name, (episodes, groups) in parts.items()
  }


def throughput(rollout: Rollout) -> dict[str, float]:
  """Return tokens per second, row steps per token, share of environments."""
  tokens = sum(episode.sampled_count for episode in rollout.episodes)
  return {
    'tokens_per_second': tokens / rollout.seconds,
    'row_steps_per_token': rollout.row_steps / max(tokens, 1),
    'environment_share': rollout.env_seconds / rollout.seconds,
  }


def viewer_record(
  episode: Episode,
  chat,
  *,
  step: int,
  group: int,
  member: int,
  signal_T: np.ndarray,
  weight_T: np.ndarray,
) -> dict[str, Any]:
  """Return a finished episode as a JSON object; see report/viewer.py.

  `signal_T` and `weight_T` are at least as long as the episode.
  """

  def token(turn, offset: int, logprob: float) -> dict[str, Any]:
    position = turn.start + offset
    return {
      'text': chat.text([episode.ids[position]]),
      'logprob': round(logprob, 4),
      'action': turn.response.action[offset],
      'weight': round(float(weight_T[position]), 4),
      'signal': round(float(signal_T[position]), 4),
    }

  turns = [
    {
      'prompt': chat.text(episode.ids[turn.prompt : turn.start]),
      'response': [
        token(turn, i, logprob)
        for i, logprob in enumerate(episode.logprobs(turn))
      ],
      'reward': turn.result.reward,
      'penalty': turn.result.penalty,
      'answer': turn.response.answer,
    }
    for turn in episode.turns
  ]
  return {
    'step': step,
    'game': episode.game.name,
    'group': group,
    'member': member,
    'success': episode.success,
    'return': episode.episode_return,
    'failure': episode.failure.reason if episode.failure else None,
    'turns': turns,
  }


def _mean(values) -> float:
  return float(np.mean(np.asarray(values, np.float64))) if values else 0.0
