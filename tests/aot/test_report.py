"""Slices, meshes, the roofline and the smallest slice, by hand."""

import json

import pytest

from actfocus_jax.aot import chips, hlo, measure, meshes, report
from actfocus_jax.config import presets, schema
from actfocus_jax.model import architecture

QWEN = architecture.Config(**presets.SHAPES[presets.MODELS['3b']])


def config(algo='ppo'):
  """Sokoban with the 3B model."""
  c = schema.defaults('sokoban')
  choice_of = dict(size='3b', algo=algo, weights='actfocus', estimator='auto')
  c.selection.ratio = 0.25
  presets.apply(c, choice_of)
  return c


# --- Slices ------------------------------------------------------------------


def test_topology_counts_its_chips():
  topology = chips.parse('v5p:2x2x4')
  assert (topology.chips, str(topology)) == (16, 'v5p:2x2x4')
  topology = chips.parse('v5e:16x16', slices=16)
  assert (topology.chips, str(topology)) == (4096, '16 x v5e:16x16')


@pytest.mark.parametrize(
  ('text', 'slices', 'sentence'),
  [
    ('v9:4x4', 1, "'v9:4x4'; allowed: KIND:SHAPE with KIND one of v5e, v6e"),
    ('v5e', 1, 'slices of v5e: 1x1, 2x2'),
    ('v5e:4x5', 1, 'the nearest is v5e:4x4'),
    ('v5p:4x4', 1, 'the nearest is v5p:2x2x4'),
    ('v5e:4x4', 0, '--slices is 0; allowed: 1 to'),
  ],
)
def test_other_topologies_are_refused(text, slices, sentence):
  with pytest.raises(chips.UsageError, match=sentence):
    chips.parse(text, slices)


@pytest.mark.parametrize(
  ('kind', 'count', 'expected'),
  [
    ('v5p', 4096, 'v5p:16x16x16'),
    ('v5e', 512, '2 x v5e:16x16'),
    ('v5e', 4096, '16 x v5e:16x16'),
    ('v5e', 1, 'v5e:1x1'),
    ('v5p', 1, 'None'),
  ],
)
def test_chips_lie_in_as_few_slices_as_hold_them(kind, count, expected):
  assert str(chips.with_chips(kind, count)) == expected


# --- Meshes ------------------------------------------------------------------


def test_mesh_rule_takes_key_heads_and_the_least_fsdp():
  found = meshes.by_rule(config(), QWEN, 16, 1)
  order = [(x.shape.tensor, x.shape.fsdp) for x in found]
  # 2 key heads; a larger `tensor` comes last.
  assert order[:4] == [(2, 1), (2, 2), (2, 4), (2, 8)]
  assert order[4][0] == 1 and order[-1][0] == 16
  memory = found[2].by_formula
  assert meshes.promising(found, memory)[0] is found[2]
  assert meshes.promising(found, memory / 100) == []


def test_mesh_rule_needs_tensor_beyond_the_rows():
  # 32 rows are trained on, so 64 chips are 32 row shards at most.
  found = meshes.by_rule(config(), QWEN, 64, 1)
  assert max(x.shape.data * x.shape.fsdp for x in found) == 32


def test_mesh_flags_name_what_differs():
  found = meshes.by_rule(config(), QWEN, 16, 2)
  plan = next(x for x in found if x.shape.inside == (4, 2, 2))
  assert plan.flags == (
    '--config.learner.fused=False',
    '--config.learner.microbatch=16',
    '--config.mesh.fsdp=2',
    '--config.mesh.tensor=2',
  )


def test_mesh_of_the_config_must_fit():
  c = config()
  c.mesh.fsdp = 3
  with pytest.raises(ValueError, match='mesh .*fsdp=3'):
    meshes.of_config(c, QWEN, 16, 1)
  c.mesh.update(fsdp=8, tensor=2)
  with pytest.raises(ValueError, match='microbatch, 4, into 8'):
    meshes.of_config(c, QWEN, 16, 1)
  c.learner.microbatch = 8
  plan = meshes.of_config(c, QWEN, 16, 1)
  assert plan.shape.inside == (1, 8, 2)
  assert plan.flags == ('--config.learner.fused=False',)


# --- Roofline ----------------------------------------------------------------


def cost(phase='update', calls=2.0, flops=0.0, **changes):
  return measure.Cost(f'{phase}, x', phase, calls, flops, **changes)


@pytest.mark.parametrize(
  ('changes', 'seconds', 'bound'),
  [
    (dict(flops=2 * 197e12, read_written=819e9), 2, 'compute'),
    (dict(flops=197e12, read_written=3 * 819e9), 3, 'memory'),
    (dict(ici=4 * 200e9), 4, 'ici'),
    (dict(dcn=5 * 3.125e9), 5, 'dcn'),
  ],
)
def test_roofline_is_the_slowest_of_four(changes, seconds, bound):
  sent = {name: changes.pop(name, 0.0) for name in ('ici', 'dcn')}
  collective = hlo.Collective('all-gather', 'fsdp', 1.0, **sent)
  found = report.timed(
    cost(collectives=(collective,), **changes), chips.CHIPS['v5e']
  )
  assert found['call_seconds'] == pytest.approx(seconds)
  assert found['bound'] == bound


def faked(topology, *, fits=True):
  """An answer of one second in each phase, one of them by two programs."""
  v5e = chips.CHIPS['v5e']
  costs = [
    cost('rollout', 4, flops=0.1 * 197e12),
    cost('rollout', 2, read_written=0.3 * 819e9),
    cost('score', 1, flops=197e12),
    cost('update', 1, flops=197e12),
    cost('update', 0, flops=1e20),
  ]
  timed = [report.timed(x, v5e) for x in costs]
  memory = {'needed': 12.34e9, 'usable': 16.9e9, 'program': 'update, x'}
  found = {
    'config': '3b, ppo',
    'reached': [0.5, 1.0, 1.0],
    'topology': str(topology),
    'chips': topology.chips,
    'mesh': {'data': 1, 'fsdp': 8, 'tensor': 2},
    'microbatch': 16,
    'memory': memory | {'by_formula': 11e9, 'parts': {'actor': 1e9}},
    'programs': timed,
    'kernels': [],
    'fits': fits,
    'price': v5e.price,
    'workload': dict(is_most=True, prompt_tokens=1, turns=2, response_tokens=3)
    | dict(observation_tokens=4, length=5, context=6),
    'flags': ['--config.mesh.fsdp=8', '--config.mesh.tensor=2'],
  }
  if fits:
    found['iteration'] = report.iteration(timed, 30_000, topology)
  return found


def test_iteration_adds_up_time_tokens_and_dollars():
  found = faked(chips.parse('v5e:4x4'))['iteration']
  assert found['seconds'] == pytest.approx(
    {'rollout': 1.0, 'score': 1.0, 'update': 1.0, 'all': 3.0}
  )
  assert found['bounds']['rollout'] == 'memory'  # 0.6 of 1.0 s
  assert found['calls'] == 8 and found['tokens_per_second'] == 10_000
  # 16 chips at $1.20 an hour for 3 s.
  assert found['dollars'] == pytest.approx(3 * 16 * 1.2 / 3600)
  assert found['dollars_per_million'] == pytest.approx(0.016 / 0.03)


def test_smallest_slice_is_the_first_that_fits():
  asked = []

  def answer_of(topology):
    asked.append(str(topology))
    return faked(topology, fits=topology.chips >= 4)

  found = report.smallest(chips.all_of('v5e'), answer_of)
  assert found['fits'] and found['chips'] == 4
  assert asked == ['v5e:1x1', 'v5e:2x2']
  none = report.smallest(chips.all_of('v5e'), lambda x: faked(x, fits=False))
  assert none['topology'] == 'v5e:16x16' and not none['fits']


def test_growing_batch_keeps_the_share_of_each_chip():
  four, thousand = report.growing(4), report.growing(1024)
  assert four['rollout.prompts'] == 8  # The paper's is the least.
  assert thousand['rollout.prompts'] == 1024
  # A quarter of the groups of 16 is kept: one update of all of them.
  assert thousand['learner.minibatch'] == 0.25 * 1024 * 16


def test_row_and_text_show_the_answer():
  topology = chips.parse('v5e:4x4')
  found = json.loads(json.dumps(faked(topology)))
  columns = report.HEAD.splitlines()[0].count('|')
  row = report.row('3b, ppo', found)
  assert row == (
    '| 3b, ppo | 16 | v5e:4x4 | fsdp 8 x tensor 2 | 12.3 of 16.9 | update, x | '
    '1.00, 1.00, 1.00 | memory, compute, compute | 10,000 | 0.016 | 0.53 |'
  )
  does_not = report.row('3b, ppo', faked(topology, fits=False))
  refused = report.row('x', {'topology': 'v5p', 'refused': 'no', 'fits': False})
  assert 'does not fit' in does_not and '| no |' in refused
  assert {x.count('|') for x in (row, does_not, refused)} == {columns}
  *_, times, _, last = report.describe(found).splitlines()
  assert 'at least 3 s' in times
  assert '50%, 100%, 100% of the peaks' in report.assumptions(found)
  assert last.endswith('--config.mesh.fsdp=8 --config.mesh.tensor=2')
