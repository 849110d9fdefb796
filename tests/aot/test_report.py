"""Slices, meshes, the roofline and the smallest slice, by hand."""

import dataclasses
import json

import pytest

from actfocus_jax import errors
from actfocus_jax.aot import chips, hlo, measure, programs, report
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
  (topology,) = chips.parse('v5p:2x2x4')
  assert (topology.chips, str(topology)) == (16, 'v5p:2x2x4')
  (topology,) = chips.parse('v5e:16x16', slices=16)
  assert (topology.chips, str(topology)) == (4096, '16 x v5e:16x16')


def test_kind_alone_is_all_its_slices_from_the_smallest():
  sizes = [topology.chips for topology in chips.parse('v5p')]
  assert sizes[0] == 4 and sizes[-1] == 4096 and sizes == sorted(sizes)


@pytest.mark.parametrize(
  ('text', 'slices', 'sentence'),
  [
    ('v9:4x4', 1, "'v9:4x4'; allowed: KIND:SHAPE or KIND with KIND one of v5e"),
    ('v5e:', 1, 'slices of v5e: 1x1, 2x2'),
    ('v5p:4x4', 1, 'the nearest is v5p:2x2x4'),
    ('v5e:4x4', 0, '--slices is 0; allowed: 1 to'),
  ],
)
def test_other_topologies_are_refused(text, slices, sentence):
  with pytest.raises(errors.UsageError, match=sentence):
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
  found = report.plans_by_rule(config(), QWEN, 16, 1)
  order = [(x.shape.tensor, x.shape.fsdp) for x in found]
  # 2 key heads; a larger `tensor` comes last.
  assert order[:4] == [(2, 1), (2, 2), (2, 4), (2, 8)]
  assert order[4][0] == 1 and order[-1][0] == 16
  memory = found[2].by_formula
  assert report.promising(found, memory)[0] is found[2]
  assert report.promising(found, memory / 100) == []


def test_mesh_rule_needs_tensor_beyond_the_rows():
  # 32 rows are trained on, so 64 chips are 32 row shards at most.
  found = report.plans_by_rule(config(), QWEN, 64, 1)
  assert max(x.shape.data * x.shape.fsdp for x in found) == 32


def test_mesh_flags_name_what_differs():
  found = report.plans_by_rule(config(), QWEN, 16, 2)
  plan = next(x for x in found if x.shape.inside == (4, 2, 2))
  assert report.changed_flags(config(), plan.c) == [
    '--config.learner.fused=False',
    '--config.learner.microbatch=16',
    '--config.mesh.fsdp=2',
    '--config.mesh.tensor=2',
  ]


def test_mesh_of_the_config_must_fit():
  c = config()
  c.mesh.fsdp = 3
  with pytest.raises(ValueError, match='mesh .*fsdp=3'):
    report.plan_of(c, QWEN, 16, 1)
  c.mesh.update(fsdp=8, tensor=2)
  with pytest.raises(ValueError, match='microbatch, 4, into 8'):
    report.plan_of(c, QWEN, 16, 1)
  c.learner.microbatch = 8
  assert report.plan_of(c, QWEN, 16, 1).shape.inside == (1, 8, 2)


# --- Roofline ----------------------------------------------------------------

V5E = chips.CHIPS['v5e']


def cost(phase='update', calls=2.0, moved=0.0, flops=0.0, sent=()):
  collectives = tuple(
    hlo.Collective('all-gather', network, 1.0, x) for network, x in sent
  )
  return measure.Cost(
    f'{phase}, x', phase, calls, moved, flops, collectives=collectives
  )


@pytest.mark.parametrize(
  ('changes', 'seconds', 'bound'),
  [
    (dict(flops=2 * 197e12, moved=819e9), 2, 'compute'),
    (dict(flops=197e12, moved=3 * 819e9), 3, 'memory'),
    (dict(moved=819e9, sent=[('ici', 3 * 200e9), ('ici', 200e9)]), 4, 'ici'),
    (dict(sent=[('ici', 200e9), ('dcn', 5 * 3.125e9)]), 5, 'dcn'),
  ],
)
def test_roofline_is_the_slowest_of_four(changes, seconds, bound):
  found = report.timed(cost(**changes), V5E)
  assert found['seconds'] == pytest.approx(seconds)
  assert found['bound'] == bound


def three_seconds():
  """An answer of one second in each phase, one of them by two programs."""
  costs = [
    cost('rollout', 4, flops=0.1 * 197e12),
    cost('rollout', 2, moved=0.3 * 819e9),
    cost('score', 1, flops=197e12),
    cost('update', 1, flops=197e12, sent=[('ici', 2e6)]),
    cost('update', 0, flops=1e20),
  ]
  timed = [report.timed(x, V5E) for x in costs]
  return {
    'config': '3b, ppo',
    'topology': 'v5e:4x4',
    'chips': 16,
    'mesh': {'data': 1, 'fsdp': 8, 'tensor': 2},
    'microbatch': 16,
    'memory': {'needed': 12.34e9, 'usable': 16.9e9, 'program': 'update, x'}
    | {'by_formula': 11e9, 'parts': {'actor': 1e9}},
    'programs': timed,
    'fits': True,
    'workload': dataclasses.asdict(programs.Workload(1, 2, 3, 4, 50, 6))
    | {'length': 19},
    'flags': ['--config.mesh.fsdp=8', '--config.mesh.tensor=2'],
    'iteration': report.iteration(timed, 30_000),
  }


def test_iteration_adds_up_time_and_tokens():
  found = three_seconds()['iteration']
  assert found['seconds'] == pytest.approx(
    {'rollout': 1.0, 'score': 1.0, 'update': 1.0, 'all': 3.0}
  )
  assert found['bounds']['rollout'] == 'memory'  # 0.6 of 1.0 s
  assert found['flops'] == pytest.approx(2.4 * 197e12)
  assert found['tokens_per_second'] == pytest.approx(10_000)


def test_smallest_slice_is_the_first_that_fits():
  compiled = []

  def answer_of(topology):
    compiled.append(str(topology))
    return {'fits': topology.chips >= 4, 'chips': topology.chips}

  found = report.smallest(chips.parse('v5e'), answer_of)
  assert found == {'fits': True, 'chips': 4}
  assert compiled == ['v5e:1x1', 'v5e:2x2']
  none = report.smallest(
    chips.parse('v5e'), lambda x: {'fits': False, 'chips': x.chips}
  )
  assert none == {'fits': False, 'chips': 256}


def test_growing_batch_keeps_the_share_of_each_chip():
  c = config()
  four, thousand = report.growing(c, 4), report.growing(c, 1024)
  assert four['rollout.prompts'] == c.rollout.prompts == 8
  assert thousand['rollout.prompts'] == 1024
  assert thousand['rollout.slots'] == 16 * 1024
  # A quarter of the groups of 16 is kept: one update of all of them.
  assert thousand['learner.minibatch'] == 0.25 * 1024 * 16


def test_row_and_text_show_the_answer():
  found = json.loads(json.dumps(three_seconds()))
  row = report.row('v5e, 16', found)
  assert '| fsdp 8 x tensor 2 | 12.3 of 16.9 | update, x | 1.00, 1.00' in row
  does_not = report.row('x', found | {'fits': False})
  refused = report.row('x', {'topology': 'v5p', 'refused': 'no', 'fits': False})
  assert 'does not fit' in does_not and '| no |' in refused
  columns = report.HEAD.splitlines()[0].count('|')
  assert {x.count('|') for x in (row, does_not, refused)} == {columns}
  text = report.describe(found)
  assert 'at least 3 s' in text and 'all-gather' in text
  assert text.endswith('--config.mesh.fsdp=8 --config.mesh.tensor=2')
