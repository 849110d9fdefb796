"""Numbers and texts of finished episodes, worked by hand."""

import json
import types

import numpy as np
import pytest

from actfocus_jax.envs import frozen_lake
from actfocus_jax.rollout import collector, games
from actfocus_jax.rollout import episode as episode_lib
from actfocus_jax.rollout import statistics as statistics_lib

LAKE = frozen_lake.FrozenLake(success_probability=1.0, instructions='Walk.')
LIMITS = games.Limits(turns=2, action_budget=4)


def play(chat, *answers):
  """One episode on a corridor to the goal; None is an unreadable answer."""
  state, text = LAKE.load('SFG')
  ids, system_count = chat.opening('Walk.', text)
  game = games.Game('lake', LAKE, LIMITS)
  opening = episode_lib.Opening(game, state, text, tuple(ids), system_count)
  one = episode_lib.Episode(chat, opening)
  for answer in answers:
    sampled = chat.respond('so', answer) if answer else [5, 6]
    one.respond(sampled, [-0.5] * len(sampled))
  assert one.over
  return one


@pytest.fixture(scope='module')
def finished(chat):
  episodes = [
    play(chat, ['Right', 'Right']),
    play(chat, None, ['Left', 'Right']),
    play(chat, ['Left', 'Up'], None),
    play(chat, None, None),
  ]
  return collector.Rollout(
    episodes, [0, 0, 1, 1], row_steps=500, seconds=2.0, env_seconds=0.5
  )


def test_episode_means_by_hand(finished):
  found = statistics_lib.episode_means(finished)
  tokens = [episode.sampled_count for episode in finished.episodes]
  assert tokens[0] > tokens[3] == 4
  assert found == pytest.approx(
    {
      'success': 1 / 4,
      'return': (1.0 - 0.1 - 0.1 - 0.2) / 4,
      'pass_at_g': 1 / 2,
      'turns': 7 / 4,
      'actions': 6 / 4,
      'tokens': sum(tokens) / 4,
      'valid_turns': 3 / 7,
      'effective_actions': 3 / 6,  # Left and Up run into the border.
      'truncated': 0.0,
      'failed': 0.0,
    }
  )


def test_info_means_count_only_games_that_report(finished, chat):
  """Shops and lakes in one batch: the purchase rate is that of the shops."""

  def episode(game, *infos):
    turns = [
      types.SimpleNamespace(result=types.SimpleNamespace(info=info))
      for info in infos
    ]
    return types.SimpleNamespace(
      game=types.SimpleNamespace(name=game), turns=turns
    )

  played = [
    episode('shop', {'bought': 0.0}, {'bought': 1.0}),
    episode('shop', {}),
    episode('shop', {'bought': 0.0, 'price': 3.0}),
    episode('shop', {'bought': 1.0}),
    *[episode('lake', {'steps': 2.0})] * 2,
  ]
  found = statistics_lib._info_means(played)
  assert found == {'bought': 2 / 4, 'price': 3 / 4, 'steps': 2.0}


def test_throughput_by_hand(finished):
  tokens = sum(episode.sampled_count for episode in finished.episodes)
  assert statistics_lib.throughput(finished) == pytest.approx(
    {
      'tokens_per_second': tokens / 2.0,
      'row_steps_per_token': 500 / tokens,
      'environment_share': 0.25,
    }
  )


def test_viewer_record_by_hand(finished, chat):
  one = finished.episodes[1]
  position_T = np.arange(len(one.ids) + 9, dtype=np.float32)
  record = statistics_lib.viewer_record(
    one,
    chat,
    step=7,
    group=0,
    member=1,
    signal_T=-position_T,
    weight_T=position_T / 8,
  )
  assert json.loads(json.dumps(record)) == record
  first, second = record.pop('turns')
  assert record == {
    'step': 7,
    'game': 'lake',
    'group': 0,
    'member': 1,
    'success': False,
    'return': pytest.approx(-0.1),
    'failure': None,
  }
  assert first['answer'] is None and second['answer'] == ['Left', 'Right']
  assert (first['reward'], first['penalty']) == (0.0, -0.1)
  assert (second['reward'], second['penalty']) == (0.0, 0.0)
  assert first['prompt'].startswith('<|im_start|>system\nWalk.')
  texts = [token['text'] for token in second['response']]
  assert ''.join(texts) == (
    'so</think><answer>Left || Right</answer><|im_end|>'
  )
  marked = [t['text'] for t in second['response'] if t['action']]
  assert ''.join(marked) == 'Left || Right'
  assert {token['logprob'] for token in second['response']} == {-0.5}
  turn = one.turns[1]
  positions = list(range(turn.start, turn.stop))
  assert [-token['signal'] for token in second['response']] == positions
  assert [8 * token['weight'] for token in second['response']] == positions
