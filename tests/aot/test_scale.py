"""The curves by hand, and the picture."""

import json

import matplotlib.image
import pytest

from actfocus_jax.aot import many, plot, roofline, scale, workload
from actfocus_jax.config import schema


def told(where, *, seconds=1.0, fits=True):
  """What `cells.answer` would say of a program of each phase."""
  return {
    'topology': str(where),
    'chips': where.chips,
    'hosts': where.pool,
    'mesh': {'data': where.chips, 'fsdp': 1, 'tensor': 1},
    'price': 3.6,
    'efficiency': {'compute': 1.0, 'memory': 0.7, 'network': 1.0},
    'assumptions': 'Episodes are short.',
    'fits': fits,
    'workload': {'turns': 5},
    'programs': [
      {
        'name': name,
        'phase': phase,
        'calls': calls,
        'call_seconds': seconds / calls,
        'bound': bound,
        'times': {'dcn': 0.0},
      }
      for name, phase, calls, bound in (
        ('decode, view 128', 'rollout', 100, 'memory'),
        ('prefill, view 128', 'rollout', 50, 'compute'),
        ('score, length 8', 'score', 1, 'compute'),
        ('update, length 8', 'update', 1, 'ici'),
      )
    ],
    'iteration': {
      'seconds': {
        'rollout': 2 * seconds,
        'score': seconds,
        'update': seconds,
        'all': 4 * seconds,
      },
      'calls': 152,
      'tokens': 1_000_000,
    },
  }


def test_hosts_share_turns_and_follow_everything():
  host = scale.Host(
    call=0.01, own_turn=0.1, turn=0.02, slot=0.001, opening=3.0, episode=0.5
  )
  where = scale.slices_of('v5e', 16)
  # 4 hosts play 32 of the 128 episodes each, 5 turns long. Each of them follows
  # all: 100 calls to decode, their turns, the 8 boards, and the batch.
  called, own = 152 * 0.01, 32 * 5 * 0.1
  followed = 128 * (100 * 0.001 + 5 * 0.02 + 0.5) + 8 * 3.0
  found = host.seconds(told(where), prompts=8, members=16)
  assert found == pytest.approx(called + own + followed)


def test_a_point_adds_the_host_and_the_price():
  where = scale.slices_of('v5e', 16)
  point = scale.summary(
    told(where), 8, scale.Host(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
  )
  assert point['seconds']['all'] == 4.0 + 152
  assert point['tokens_per_second'] == 1_000_000 / 156
  # 16 chips at $3.60 an hour, a tenth of a cent a second each.
  assert point['dollars'] == pytest.approx(156 * 16 * 0.001)
  assert point['dollars_per_million'] == pytest.approx(point['dollars'])
  assert point['bounds'] == {
    'rollout': 'memory',
    'score': 'compute',
    'update': 'ici',
  }


@pytest.mark.parametrize(
  ('kind', 'count', 'expected'),
  [
    ('v5p', 4096, 'v5p:16x16x16'),
    ('v5e', 256, 'v5e:16x16'),
    ('v5e', 512, '2 x v5e:16x16'),
    ('v5e', 4096, '16 x v5e:16x16'),
    ('v5e', 1, 'v5e:1x1'),
    ('v5p', 1, 'None'),
  ],
)
def test_chips_lie_in_as_few_slices_as_hold_them(kind, count, expected):
  assert str(scale.slices_of(kind, count)) == expected


def test_a_growing_batch_keeps_the_share_of_each_chip():
  four, thousand = scale.growing(4), scale.growing(1024)
  assert four['rollout__prompts'] == 8  # The paper's is the least.
  assert thousand['rollout__prompts'] == 1024
  assert thousand['learner__minibatch'] == 4 * 1024
  # A quarter of the groups of 16 is kept: one update of all of them.
  assert thousand['learner__minibatch'] == 0.25 * 1024 * 16


def test_speed_is_compared_with_the_fewest_chips():
  points = [
    {'line': 'a', 'chips': n, 'tokens_per_second': speed, 'seconds': {}}
    for n, speed in ((4, 100.0), (8, 150.0))
  ]
  points.append({'line': 'a', 'chips': 16, 'refused': 'no'})
  assert scale.efficiency(points, 'a') == {4: 1.0, 8: 0.75}
  assert scale.efficiency(points, 'b') == {}


def test_every_point_is_asked_for_and_drawn(tmp_path, monkeypatch):
  asked = []

  def ask(cell):
    where, prompts = cell.where, dict(cell.changes).get('rollout__prompts')
    asked.append((cell.size, cell.algo, str(where), prompts))
    return told(where, seconds=1 + 10 / where.chips, fits=where.chips < 128)

  monkeypatch.setattr(
    many.Asks,
    'answers',
    lambda _, searches: [ask(cell) for (cell,) in searches],
  )
  monkeypatch.setattr(
    scale,
    'LINES',
    (
      scale.Line('first', 'v5p', (1, 4, 64, 128), False),
      scale.Line('second grows', 'v5e', (4, 64), True),
    ),
  )
  c = schema.defaults('frozen_lake')
  asks = many.Asks(
    lambda size, algo: (c, None),
    lambda c: workload.Workload(1, 1, 1, 1, 8, 1),
    roofline.Efficiency(),
    None,
    tmp_path,
  )
  titles, draw = [], plot.scale
  monkeypatch.setattr(
    plot,
    'scale',
    lambda points, path, title, assumed: (
      titles.append(title),
      draw(points, path, title, assumed),
    ),
  )
  text = scale.run(asks)
  assert titles == ['Qwen2.5-3B, PPO on frozen_lake']
  # There is no v5p slice of one chip; on 128 it does not fit.
  assert asked == [
    ('3b', 'ppo', 'v5p:2x2x1', None),
    ('3b', 'ppo', 'v5p:4x4x4', None),
    ('3b', 'ppo', 'v5p:4x4x8', None),
    ('3b', 'ppo', 'v5e:2x2', 8),
    ('3b', 'ppo', 'v5e:8x8', 64),
  ]
  lines = text.splitlines()
  assert len(lines) == 2 + 6 + 2
  for word in (
    'Episodes are short.',
    '100% of compute, 70% of memory, 100% of network',
    'hour: v5p $3.60, v5e $3.60',
    '2 ms a call',
    '0.19 ms a turn',
  ):
    assert word in lines[-1]
  assert (tmp_path / 'scale.md').read_text() == f'{text}\n'
  assert 'v5p has no slice of 1' in text and 'does not fit' in text
  points = json.loads((tmp_path / 'scale.json').read_text())
  assert [one['chips'] for one in points] == [1, 4, 64, 128, 4, 64]
  height, width = matplotlib.image.imread(tmp_path / 'scale.png').shape[:2]
  assert (width, height) == (1800, 672)
