"""Episodes played by hand: each way to end, and who wrote which token."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest
from trajectory_check import check_trajectory

from actfocus_jax.envs import frozen_lake
from actfocus_jax.rollout import env_pool, games
from actfocus_jax.rollout import episode as episode_lib

LIMITS = games.Limits(
  turns=3, max_actions=2, action_budget=5, response_tokens=40, context=500
)
LAKE = frozen_lake.FrozenLake(success_probability=1.0, instructions='Walk.')
BOARD = 'SFFG\nFHFF'


def start(chat, **limits):
  limits = dataclasses.replace(LIMITS, **limits)
  state, text = LAKE.load(BOARD)
  ids, system_count = chat.opening('Walk.', text)
  game = games.Game('lake', LAKE, limits)
  opening = episode_lib.Opening(game, state, text, tuple(ids), system_count)
  return episode_lib.Episode(chat, opening)


def say(episode, chat, *actions):
  """Answers with these actions; without any, with something unreadable."""
  if actions:
    ids = chat.respond('so', actions)
  else:
    ids = chat.tokenizer.encode('so</think>Up', add_special_tokens=False)
  return episode.respond(ids, logprobs_of(len(episode.turns), len(ids)))


def logprobs_of(turn, count):
  """Different for every token of an episode."""
  return [-turn - 0.01 * (i + 1) for i in range(count)]


def test_goal_ends_with_success(chat):
  episode = start(chat)
  assert say(episode, chat, 'Right', 'Right') is not None
  assert not episode.over and episode.actions_left == 3
  assert say(episode, chat, 'Right', 'Left') is None
  assert episode.over and episode.success and not episode.truncated
  assert [turn.result.reward for turn in episode.turns] == [0.0, 1.0]
  assert [turn.result.actions_used for turn in episode.turns] == [2, 1]
  assert episode.episode_return == 1.0


def test_spent_budget_ends(chat):
  """Three actions in all: the fourth is dropped, without penalty."""
  episode = start(chat, action_budget=3)
  assert say(episode, chat, 'Right', 'Left') is not None
  assert say(episode, chat, 'Right', 'Jump') is None
  assert episode.actions_left == 0 and episode.over and not episode.success
  assert episode.episode_return == 0.0 and episode.state.player == (0, 1)


def test_last_turn_ends(chat):
  episode = start(chat)
  assert say(episode, chat, 'Right') is not None
  assert say(episode, chat, 'Left') is not None
  assert say(episode, chat, 'Right') is None
  assert episode.over and not episode.truncated and not episode.success
  assert episode.actions_left == 2


def test_malformed_turns_cost_a_penalty_and_a_turn(chat):
  episode = start(chat)
  before = episode.state
  prompt = say(episode, chat)
  assert episode.state == before and episode.actions_left == 5
  assert 'Reward: 0\nTurn 2:' in chat.text(prompt)  # Penalties are not shown.
  say(episode, chat)
  assert say(episode, chat) is None and episode.over
  assert [turn.response.answer for turn in episode.turns] == [None] * 3
  assert episode.episode_return == pytest.approx(-0.3)


@pytest.mark.parametrize(
  ('actions', 'player', 'used', 'penalty'),
  [
    (('Jump', 'Right'), (0, 1), 1, -0.1),  # The known one is run all the same.
    (('Jump', 'Fly'), (0, 0), 0, -0.1),  # Once per turn.
    (('right', 'RIGHT'), (0, 2), 2, 0.0),
    (('Right', 'Left', 'Jump'), (0, 0), 2, 0.0),  # The third is cut unjudged.
    (('',), (0, 0), 0, -0.1),
  ],
)
def test_turn_by_hand(chat, actions, player, used, penalty):
  episode = start(chat)
  say(episode, chat, *actions)
  (turn,) = episode.turns
  assert episode.state.player == player
  assert (turn.result.actions_used, turn.result.penalty) == (used, penalty)
  assert any(turn.response.action) == bool(''.join(actions))


def test_context_without_room_truncates_the_episode(chat):
  roomy = start(chat)
  say(roomy, chat, 'Right')
  length = len(roomy.ids)

  tight = start(chat, context=length)
  assert say(tight, chat, 'Right') is None
  assert tight.over and tight.truncated and not tight.success
  assert len(tight.ids) == tight.turns[-1].stop < length

  enough = start(chat, context=length + 1)
  assert say(enough, chat, 'Right') is not None
  assert not enough.over and enough.token_budget == 1


def test_anchor_of_a_state_met_again_is_that_of_its_first_turn(chat):
  """The anchor of a turn names the state at its beginning."""
  episode = start(chat)
  text = episode.text
  say(episode, chat, 'Right')
  say(episode, chat, 'Left')
  say(episode, chat, 'Right')
  first, second, third = (turn.anchor for turn in episode.turns)
  assert first == third == episode_lib.anchor_of(text) != second
  batch = episode_lib.to_trajectory([episode], [0], length=999, pad=0)
  for turn in episode.turns:
    assert set(batch.anchor[0, turn.start : turn.stop]) == {turn.anchor}


def test_row_by_hand(chat):
  """A stopped answer, then a cut and malformed one."""
  episode = start(chat, turns=2)
  opening = list(episode.ids)
  answer = chat.respond('so', ['Right', 'Right'])
  prompt = say(episode, chat, 'Right', 'Right')
  assert say(episode, chat) is None
  cut = chat.tokenizer.encode('so</think>Up', add_special_tokens=False)
  pieces = chat.tokenizer.convert_ids_to_tokens(answer)
  inside = slice(pieces.index('<answer>') + 1, pieces.index('</answer>'))
  action = np.zeros(len(answer), bool)
  action[inside] = True
  assert 0 < action.sum() < len(answer)

  length, pad = len(episode.ids) + 3, chat.pad_id
  batch = episode_lib.to_trajectory([episode], [4], length=length, pad=pad)
  check_trajectory(batch)
  parts = [len(opening), len(answer), len(prompt), len(cut), 3]

  def row(*values):
    return np.repeat(values, parts)

  ids = [*opening, *answer, *prompt, *cut, *[pad] * 3]
  assert batch.tokens[0].tolist() == ids
  user = ids.index(ids[0], 1)  # The second `<|im_start|>`.
  system = np.arange(length) < user
  np.testing.assert_array_equal(
    batch.turn[0], np.where(system, -1, row(0, 0, 1, 1, -1))
  )
  np.testing.assert_array_equal(batch.valid[0], row(1, 1, 1, 1, 0))
  np.testing.assert_array_equal(batch.sampled[0], row(0, 1, 0, 1, 0))
  begin = parts[0]
  np.testing.assert_array_equal(
    batch.action[0, begin : begin + len(answer)], action
  )
  assert batch.action.sum() == action.sum()
  ends = np.cumsum(parts)[[1, 3]] - 1
  assert np.flatnonzero(batch.turn_end[0]).tolist() == ends.tolist()
  np.testing.assert_allclose(batch.reward[0, ends], [0.0, -0.1])
  assert batch.reward.sum() == np.float32(-0.1)
  logprob = [*logprobs_of(0, parts[1]), *logprobs_of(1, parts[3])]
  np.testing.assert_allclose(batch.logprob[batch.sampled], logprob)
  assert not batch.logprob[~batch.sampled].any()
  assert batch.group.tolist() == [4] and batch.success.tolist() == [False]


# --- Another process plays it ------------------------------------------------


@pytest.mark.parametrize(
  ('moves', 'limits'),
  [
    ((['Right', 'Right'], ['Right']), {}),  # The goal ends it.
    ((['Down'], [], ['Up', 'Down']), {}),  # The turns end it.
    ((['Down'], ['Up']), {'context': 150}),  # The context ends it.
    ((['Down', 'Up'], None), {}),  # The environment fails.
  ],
)
def test_sync_in_another_process_gives_the_same_row(chat, moves, limits):
  own, other = start(chat, **limits), start(chat, **limits)
  for actions in moves:
    ids = chat.respond('so', actions or ['Up'])
    said = ids, logprobs_of(len(own.turns), len(ids))
    own.add_response(*said)
    other.add_response(*said)
    call = own.env_call()
    outcome = call() if actions is not None else env_pool.Failed('boom')
    other.sync(pickle.loads(pickle.dumps(own.apply(outcome))))
    assert other.ids == own.ids and other.over == own.over
    assert other.token_budget == own.token_budget and other.state is None
    if own.over:
      break
  assert own.over and own.truncated == other.truncated == bool(limits)
  assert own.turns == other.turns and own.failure == other.failure
  rows = [
    episode_lib.to_trajectory([one], [0], length=500, pad=chat.pad_id)
    for one in (own, other)
  ]
  for mine, theirs in zip(*map(jax.tree.leaves, rows), strict=True):
    np.testing.assert_array_equal(mine, theirs)


# --- Environments that fail --------------------------------------------------


def test_failed_turn_ends_the_episode_without_sampled_tokens(chat):
  whole, lost, other = start(chat), start(chat), start(chat)
  say(other, chat)
  say(whole, chat, 'Right', 'Right')
  say(whole, chat, 'Right', 'Left')
  say(lost, chat, 'Right')
  ids = chat.respond('so', ['Right'])
  failure = env_pool.Failed('boom')
  lost.add_response(ids, [0.0] * len(ids))
  lost.env_call()
  assert lost.apply(failure).ids is None
  assert lost.over and lost.failure is failure and not lost.success
  assert lost.ids[-len(ids) :] == ids and len(lost.turns) == 1
  length = max(len(one.ids) for one in (whole, lost, other))
  batch = episode_lib.to_trajectory(
    [whole, lost, other], [0, 0, 1], length=length, pad=chat.pad_id
  )
  check_trajectory(batch)
  assert not batch.sampled[1].any() and not batch.turn_end[1].any()
  # The mean of the others of its own group: it moves no baseline.
  np.testing.assert_allclose(batch.reward.sum(axis=1), [1.0, 1.0, -0.1])
  assert batch.valid[1].sum() == len(lost.ids)


def test_failed_reset_gives_a_finished_episode(chat):
  game = games.Game('lake', LAKE, LIMITS)
  opening = episode_lib.opening(chat, game, env_pool.Failed('boom'))
  episode = episode_lib.Episode(chat, opening)
  assert episode.over and episode.failure.reason == 'boom' and episode.ids
  batch = episode_lib.to_trajectory(
    [episode], [0], length=len(episode.ids), pad=chat.pad_id
  )
  check_trajectory(batch)
  assert not batch.reward.any() and not batch.sampled.any()
