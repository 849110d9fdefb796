"""Real rollouts: provenance, limits, and what may not change a sample."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from trajectory_check import check_trajectory

from actfocus_jax.model import scoring
from actfocus_jax.rollout import collector, env_pool, statistics
from actfocus_jax.rollout import games as games_lib
from actfocus_jax.run import metrics
from actfocus_jax.text import chat as chat_lib


def ids_of(played):
  return [episode.ids for episode in played.episodes]


def logprobs_of(played):
  return np.concatenate(
    [e.logprobs(turn) for e in played.episodes for turn in e.turns]
  )


# --- Who wrote what ----------------------------------------------------------


def test_rollout_has_each_kind_of_turn_and_end(played, chat):
  """What the tests below rely on: each kind of turn and of end happens."""
  episodes = played.episodes
  turns = [turn for episode in episodes for turn in episode.turns]
  last_ids = [e.ids[turn.stop - 1] for e in episodes for turn in e.turns]
  assert len(episodes) == 12 and played.groups == [0] * 4 + [1] * 4 + [2] * 4
  assert 0 < sum(episode.truncated for episode in episodes) < len(episodes)
  assert len({len(episode.turns) for episode in episodes}) > 1
  assert 4 < sum(i in chat.stop_ids for i in last_ids) < len(turns) - 4
  assert sum(turn.result.valid for turn in turns) > 4
  assert sum(turn.response.answer is None for turn in turns) > 4
  assert {turn.result.done for turn in turns} == {False, True}


def test_batch_passes_the_trajectory_check(batch):
  check_trajectory(batch)
  assert 4 < batch.action.sum() < batch.sampled.sum() / 2


def test_prompts_and_rewards_follow_from_the_executed_answers(
  played, lake, limits, chat, batch
):
  """Each prompt and reward again, from the executed answers alone."""
  for row, episode in enumerate(played.episodes):
    state, text = lake.reset((3, 4, 5)[played.groups[row]])
    system = chat_lib.system_message(lake.instructions, budget=5, max_actions=2)
    reward, left, begin, total = None, 5, 0, 0.0
    for index, turn in enumerate(episode.turns):
      user = chat_lib.turn_message(
        text,
        turn=index + 1,
        reward=reward,
        actions_left=left,
        response_tokens=limits.response_tokens,
      )
      head = f'<|im_start|>system\n{system}' if index == 0 else ''
      shown = chat.text(episode.ids[begin : turn.start])
      assert shown.removeprefix('<|im_end|>') == (
        f'{head}{"<|im_end|>" if head else ""}\n<|im_start|>user\n{user}'
        '<|im_end|>\n<|im_start|>assistant\n<think>'
      )
      answer = (turn.response.answer or [])[: min(2, left)]
      known = [name for name in answer if name in lake.actions]
      reward = 0.0
      for name in known:
        state, step = lake.step(state, name)
        text, reward, left = step.text, reward + step.reward, left - 1
        if step.done:
          break
      penalty = -0.1 if len(known) < len(answer) or not known else 0.0
      assert batch.reward[row, turn.stop - 1] == np.float32(reward + penalty)
      begin, total = turn.stop, total + reward + penalty
    assert state == episode.state and left == episode.actions_left
    assert episode.episode_return == pytest.approx(total)
    assert batch.reward[row].sum() == pytest.approx(total, abs=1e-6)
  assert len(set(batch.reward.sum(axis=1).round(3).tolist())) > 1


def test_prompts_begin_with_the_ids_sampled_before(played, batch):
  """Nothing lies between a turn's last sampled id and the next prompt."""
  for row, episode in enumerate(played.episodes):
    bounds = [0]
    for turn in episode.turns:
      assert turn.prompt == bounds[-1] < turn.start < turn.stop
      bounds.append(turn.stop)
    assert bounds[-1] == len(episode.ids)
    spans = [np.arange(turn.start, turn.stop) for turn in episode.turns]
    sampled = np.flatnonzero(batch.sampled[row]).tolist()
    assert sampled == np.concatenate(spans).tolist()
    assert episode.sampled_count == len(sampled)
    flags = [flag for turn in episode.turns for flag in turn.response.action]
    assert batch.action[row][sampled].tolist() == flags


def test_stop_ids_are_sampled_and_forced_ids_are_not(
  played, chat, limits, batch
):
  (stop,) = chat.stop_ids
  for row, episode in enumerate(played.episodes):
    for turn in episode.turns:
      response = episode.ids[turn.start : turn.stop]
      is_stopped = response[-1] == stop
      assert stop not in response[:-1]
      assert batch.sampled[row, turn.stop - 1]
      assert batch.turn_end[row, turn.stop - 1]
      room = limits.context - turn.start
      assert is_stopped or len(response) == min(limits.response_tokens, room)
      if turn is not episode.turns[-1]:
        assert not batch.sampled[row, turn.stop]
        assert (batch.tokens[row, turn.stop] == stop) == (not is_stopped)


# --- Two equalities ----------------------------------------------------------


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_sampler_logprobs_equal_a_full_pass(
  collect, played, pad, policy, temperature
):
  """Over several turns: a cache that went wrong would show here."""
  batch = pad(
    played if temperature == 1.0 else collect(temperature=temperature)
  )
  assert (batch.turn[batch.sampled] == 2).any()
  scores = jax.jit(
    scoring.score_tokens, static_argnames=('graphdef', 'temperature', 'chunk')
  )(
    *(policy.graphdef, policy.params, batch.tokens, batch.valid),
    temperature=temperature,
    chunk=4096,
  )
  emitted = batch.logprob[batch.sampled]
  assert emitted.std() > 0.5
  expected = np.asarray(scores.logprob_BT)[batch.sampled]
  np.testing.assert_allclose(emitted, expected, atol=2e-4)


# --- What may not change a sample --------------------------------------------


@pytest.mark.parametrize(
  'shapes',
  [
    {'slots': 5, 'decode_steps': 3},
    {'slots': 1, 'decode_steps': 1},
    {'devices': 8},
  ],
  ids=str,
)
def test_samples_do_not_depend_on_scheduling(collect, played, shapes):
  other = collect(**shapes)
  assert ids_of(other) == ids_of(played)
  np.testing.assert_allclose(logprobs_of(other), logprobs_of(played), atol=2e-4)
  assert other.groups == played.groups
  sampled = sum(episode.sampled_count for episode in other.episodes)
  assert other.row_steps >= sampled
  if shapes.get('slots') == 1:  # Nobody waits, so nothing is wasted.
    assert other.row_steps == sampled < played.row_steps


def test_samples_do_not_depend_on_the_cache_view(collect, played):
  """The first responses cross the end of the first block."""
  block = played.episodes[0].turns[0].start + 4
  other = collect(observation_block=48, cache_block=block)
  assert ids_of(other) == ids_of(played)
  np.testing.assert_allclose(logprobs_of(other), logprobs_of(played), atol=2e-4)


@pytest.mark.parametrize('devices', [1, 4])
def test_compaction_of_idle_slots_leaves_episodes_as_they_are(
  collect, monkeypatch, devices
):
  """Against the same rollout in which idle slots stay until the end."""
  play = functools.partial(collect, seeds=range(3, 11), devices=devices)
  compacted = play()
  monkeypatch.setattr(collector, 'LEAST_TO_COMPACT', 33)
  whole = play()
  assert len(whole.episodes) == 32
  # Each decode step costs one row step per slot, and slots were dropped.
  assert compacted.row_steps < whole.row_steps
  assert all(episode.over for episode in compacted.episodes)
  assert ids_of(compacted) == ids_of(whole)
  np.testing.assert_allclose(
    logprobs_of(compacted), logprobs_of(whole), atol=2e-4
  )


def test_samples_follow_the_key(collect, played):
  again, other = collect(), collect(key=1)
  assert ids_of(again) == ids_of(played)
  assert logprobs_of(again).tolist() == logprobs_of(played).tolist()
  for ours, theirs in zip(ids_of(other), ids_of(played), strict=True):
    assert ours != theirs


# --- Limits ------------------------------------------------------------------


def test_episodes_stay_within_all_limits(played, limits):
  for episode in played.episodes:
    assert episode.over and len(episode.ids) <= limits.context
    assert len(episode.turns) <= limits.turns and episode.actions_left >= 0
    for turn in episode.turns:
      assert 0 < turn.stop - turn.start <= limits.response_tokens
    if episode.truncated:
      assert len(episode.turns) < limits.turns
      assert not episode.turns[-1].result.done
  lengths = [len(episode.ids) for episode in played.episodes]
  assert max(lengths) == limits.context


def test_prompt_that_fills_the_context_is_refused(collect, played, limits):
  length = played.episodes[0].turns[0].start
  with pytest.raises(ValueError, match=f'context is {length}.*{length} tokens'):
    collect(seeds=(3,), limits=dataclasses.replace(limits, context=length))


def test_a_second_collect_compiles_nothing(collect, played):
  metrics.count_compilations()
  jax.jit(lambda x: x * 3)(np.ones(17))
  before = metrics.count_compilations()
  assert before > 0  # It does count.
  for _ in range(2):
    collect(key=0)
  assert metrics.count_compilations() == before


# --- Several games, and environments that fail -------------------------------


class Brittle:
  """A lake that cannot be reset on one seed and breaks on `Up`."""

  def __init__(self, lake):
    self.lake = lake
    self.instructions, self.actions = lake.instructions, lake.actions

  def reset(self, seed):
    if seed == 4:
      raise RuntimeError('no lake today')
    return self.lake.reset(seed)

  def step(self, state, action):
    if action == 'Up':
      raise ZeroDivisionError('the ice is too thin')
    return self.lake.step(state, action)


@pytest.mark.parametrize('threads', [0, 2])
def test_failing_environment_loses_only_its_episodes(
  collect, played, pad, lake, limits, threads
):
  games = (games_lib.Game('brittle', Brittle(lake), limits),)
  with env_pool.EnvPool(threads) as pool:
    found = collect(played=games, pool=pool)
  lost = [one.failure is not None for one in found.episodes]
  assert any(lost) and not all(lost)
  # A lake is drawn by seeds 3, 4 and 5; the second is the one without.
  for one, whole, group in zip(
    found.episodes, played.episodes, found.groups, strict=True
  ):
    names = [turn.response.answer or [] for turn in whole.turns]
    meets_up = any('Up' in name for name in names)
    if group == 1:
      assert one.failure.reason == 'RuntimeError: no lake today'
    elif one.failure:
      assert one.failure.reason == 'ZeroDivisionError: the ice is too thin'
      assert meets_up
    else:
      assert one.ids == whole.ids
  check_trajectory(pad(found))


def test_mixture_plays_each_game_within_its_limits(collect, lake, limits):
  short = dataclasses.replace(limits, turns=1)
  games = (
    games_lib.Game('long', lake, limits),
    games_lib.Game('short', lake, short),
  )
  seeds = range(3, 9)
  found = collect(played=games, seeds=seeds, members=2)
  for one, group in zip(found.episodes, found.groups, strict=True):
    assert one.game is games_lib.pick(games, seeds[group])
    assert len(one.turns) <= one.game.limits.turns
  parts = statistics.rollouts_by_game(found)
  assert set(parts) == {'long', 'short'}
  assert sum(len(part.episodes) for part in parts.values()) == 12
  assert max(len(one.turns) for one in parts['long'].episodes) > 1
