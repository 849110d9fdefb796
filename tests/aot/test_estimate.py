"""The roofline by hand; the parts of a run's memory; what is told of it."""

import dataclasses
import importlib.metadata
import types

import jax
import jax.numpy as jnp
import pytest
from aot import paper

from actfocus_jax.aot import (
  cells,
  chips,
  collectives,
  estimate,
  measure,
  programs,
  roofline,
  table,
  topology,
  workload,
)
from actfocus_jax.config import schema
from actfocus_jax.model import architecture
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.rollout import collector

V5E = chips.CHIPS['v5e']


# --- Roofline ----------------------------------------------------------------


def test_the_slowest_of_four_binds():
  times = roofline.times(
    V5E, flops=197e12, read_written=2 * 819e9, ici=100e9, dcn=0.0
  )
  assert (times.compute, times.memory, times.ici) == (1.0, 2.0, 0.5)
  assert (times.seconds, times.bound) == (2.0, 'memory')
  times = roofline.times(V5E, flops=0.0, read_written=0.0, dcn=3.125e9)
  assert (times.seconds, times.bound) == (1.0, 'dcn')
  # A million hops of a microsecond, however little is sent.
  times = roofline.times(V5E, flops=0.0, read_written=0.0, ici=8.0, hops=1e6)
  assert times.ici == pytest.approx(1.0)


def test_what_is_reached_divides_the_peaks():
  half = roofline.Efficiency(0.5, 0.25, 0.1)
  times = roofline.times(
    V5E, flops=197e12, read_written=819e9, ici=200e9, efficiency=half
  )
  assert (times.compute, times.memory) == (2.0, 4.0)
  assert times.ici == pytest.approx(10.0)


def sent(**changes):
  """By one collective; `load` is what the links are busy with."""
  zero = dict(count=1.0, ici=0.0, load=0.0, dcn=0.0)
  return collectives.Collective('all-gather', 'fsdp', **zero | changes)


def cost(**changes):
  """Of a program that does nothing but this."""
  fields = {one.name: 0.0 for one in dataclasses.fields(measure.Cost)}
  named = dict(phase='update', calls=2.0, is_timed=True, flops=1.0)
  return measure.Cost(
    **fields | named | dict(collectives=(), kernels={}) | changes
  )


@pytest.mark.parametrize(
  ('changes', 'seconds'),
  [
    # A second by the clock, and of kernels the longer of products and bytes.
    (dict(cycles=V5E.clock, kernel_flops=197e12, kernel_bytes=819e9 / 2), 2),
    (dict(cycles=V5E.clock, kernel_flops=197e11, kernel_bytes=2 * 819e9), 3),
    # Never less than the roofline, whichever of the four binds.
    (dict(cycles=V5E.clock, flops=2 * 197e12), 2),
    (dict(cycles=V5E.clock, read_written=3 * 819e9), 3),
    (dict(collectives=(sent(load=4 * 200e9),)), 4),
    (dict(collectives=(sent(dcn=5 * 3.125e9),)), 5),
  ],
)
def test_by_cycles_counts_kernels_and_is_no_less_than_the_bound(
  changes, seconds
):
  where = topology.parse('v5e:2x2')
  work = workload.Workload(1, 1, 1, 1, context=8, steps=1)
  run = types.SimpleNamespace(episodes=1, work=work)
  told = [estimate._program(cost(**changes), where, roofline.Efficiency())]
  found = estimate._iteration(told, run, where, 1.0)
  assert found['compiler_seconds'] == pytest.approx(2 * seconds)


def test_clocks_follow_from_the_peaks():
  ghz = {name: chip.clock / 1e9 for name, chip in chips.CHIPS.items()}
  assert ghz == pytest.approx({'v5e': 1.5, 'v6e': 1.75, 'v5p': 1.75}, rel=0.01)


# --- Memory ------------------------------------------------------------------

SMALL = architecture.Config(256, 64, 128, 2, 4, 2, 16)


def small_run(mesh, algo='ppo', boards=8):
  c = schema.defaults('sokoban')
  c.eval.prompts = boards
  c.algo = algo
  c.model.dtype = 'float32'
  c.limits.update(context=128, response_tokens=16, turns=2)
  c.learner.update(minibatch=32, microbatch=8)
  work = workload.Workload(20, 10, 16, 2, context=128, steps=8)
  return programs.Run(c, SMALL, mesh, work)


@pytest.fixture(scope='module')
def run():
  return small_run(mesh_lib.make_mesh(data=2, fsdp=4))


def test_parts_are_split_as_the_mesh_says(run):
  parts = {k: measure.per_chip(v) for k, v in run.parts.named().items()}
  numbers = SMALL.num_parameters
  # Norms and biases are not split: 4 x 64, 64 and 2 x (64 + 32 + 32) numbers.
  whole = 2 * 2 * 64 + 64 + 2 * (64 + 32 + 32)
  assert parts['actor'] == 4 * ((numbers - whole) / 4 + whole)
  assert parts['critic'] == parts['actor'] + 4 * 64
  assert parts['optimizers'] == pytest.approx(
    2 * (parts['actor'] + parts['critic']), abs=100
  )
  assert parts['decoding copy'] == 4 * numbers  # Not split over fsdp.
  cache = 2 * 2 * 128 * 128 * 2 * 16 * 4
  assert parts['cache'] == pytest.approx(cache / 8, rel=0.01)


def test_what_is_outside_and_what_is_given_is_everything(run):
  """No part is counted twice or forgotten while a program runs."""
  parts = {k: measure.per_chip(v) for k, v in run.parts.named().items()}
  held = dict(run.parts.named())
  ids = {
    id(leaf): part
    for part, tree in held.items()
    for leaf in jax.tree.leaves(tree)
  }
  assert len(ids) >= len(parts)
  always = {'actor', 'critic', 'optimizers', 'reference'}
  rolling = always | {'decoding copy', 'cache', 'prompt cache'}
  given = {
    'decoding copy': {'actor'},
    'prefill of prompts': {'decoding copy'},
    'admit': {'cache', 'prompt cache'},
    'prefill, view': {'decoding copy', 'cache'},
    'prefill in evaluation, view': {'decoding copy', 'cache'},
    'compact': {'cache'},
    'decode, view': {'decoding copy', 'cache'},
    'decode in evaluation, view': {'decoding copy', 'cache'},
    'score, length': {'actor', 'critic', 'reference', 'batch'},
    'update, length': {'actor', 'critic', 'optimizers'},
  }
  for program in run.programs():
    name = program.name.removesuffix(' 128')
    own = given[name.removesuffix(' in evaluation')]
    both = set(program.beside) | own
    assert not set(program.beside) & own
    if program.phase != 'rollout':
      assert both == always | {'batch'}
    else:
      assert always <= both <= rolling


def test_evaluation_counts_where_it_is_larger(run):
  """32 boards of 16 episodes; 128 slots, or all of them."""
  assert not any('evaluation' in one.name for one in run.programs())
  run = small_run(run.mesh, boards=32)
  boards = {one.name for one in run.programs() if 'evaluation' in one.name}
  assert boards == {'prefill of prompts in evaluation', 'admit in evaluation'}
  prompts = measure.per_chip(run.parts.named()['prompt cache'])
  assert prompts == 4 * measure.per_chip(run.parts.training.prompts)
  run.c.rollout.slots = 0
  larger = programs.Run(run.c, SMALL, run.mesh, run.work)
  names = [one.name for one in larger.programs() if not one.is_timed]
  assert names == [
    'compact',
    'prefill in evaluation, view 128',
    'decode in evaluation, view 128',
    'prefill of prompts in evaluation',
    'admit in evaluation',
  ]
  assert measure.per_chip(larger.parts.named()['cache']) == pytest.approx(
    4 * measure.per_chip(run.parts.named()['cache']), rel=0.01
  )
  # No more boards than in training, but more slots: 8 x 64 of 8 x 16.
  run.c.eval.update(prompts=8, members=64)
  longer = programs.Run(run.c, SMALL, run.mesh, run.work)
  names = [one.name for one in longer.programs() if not one.is_timed]
  assert 'admit in evaluation' in names
  assert 'prefill of prompts in evaluation' not in names


def test_few_slots_are_never_compacted(run):
  assert any(one.name == 'compact' for one in run.programs())
  few = small_run(run.mesh)
  few.c.update({'rollout': {'slots': 16}, 'eval': {'prompts': 1}})
  few = programs.Run(few.c, SMALL, run.mesh, few.work)
  assert few.parts.seats.batch == 16 < collector.LEAST_TO_COMPACT
  assert not any(one.name == 'compact' for one in few.programs())


def test_every_program_compiles_and_is_costed(run):
  """Small, on CPU devices: what a TPU would be asked for."""
  where = topology.Topology(V5E, '2x4')
  with jax.numpy_dtype_promotion('standard'):
    costs = measure.all_programs(run, where, 1e9, note=lambda text: None)
  by_name = {one.name: one for one in costs}
  assert list(by_name) == [program.name for program in run.programs()]
  for one in costs:
    assert one.fits and one.needed == pytest.approx(
      one.arguments + one.temporaries + one.outside
    )
  # 8 steps of 16 slots a device: 2 FLOPs for each number of the matrices (576
  # stand in norms and biases), and 4 for each of 64 head channels and 128
  # positions of each of 2 layers.
  one_id = 2 * (SMALL.num_parameters - 576) + 4 * 64 * 128 * 2
  assert by_name['decode, view 128'].flops == 8 * 16 * one_id
  update = by_name['update, length 128']
  tokens = 128 * 128 / 8  # All groups are kept: four mini-batches of 32.
  rule = 6 * tokens * 2 * SMALL.num_parameters
  assert rule < update.flops < 2 * rule
  # A quarter of the slots beside all of them.
  shrunk = by_name['compact']
  assert shrunk.temporaries == pytest.approx(shrunk.arguments / 4, rel=0.1)
  gathers = {c.axes for c in update.collectives if c.kind == 'all-gather'}
  assert any('fsdp' in axes for axes in gathers)


def test_one_refusal_is_enough(run, monkeypatch):
  """What needs the most is asked for first; the rest is not waited for."""
  monkeypatch.setattr(
    measure,
    '_one',
    lambda program, *rest: cost(
      name=program.name, fits=not program.name.startswith('update')
    ),
  )
  names, where = [one.name for one in run.programs()], topology.parse('v5e:2x4')
  noted = []
  costs = measure.all_programs(run, where, 1e9, note=noted.append)
  assert [one.name for one in costs] == names
  assert noted == [f'{name}: 0 s' for name in names]
  costs = measure.all_programs(
    run, where, 1e9, note=noted.append, until_full=True
  )
  assert [one.name for one in costs] == ['update, length 128']


def test_without_a_critic_there_is_less(run):
  alone = small_run(run.mesh, algo='grpo')
  assert alone.parts.named()['critic'] is None
  both, one = (measure.per_chip(x.parts.state) for x in (run, alone))
  assert both == pytest.approx(2 * one, rel=0.05)


def test_what_a_refusal_to_compile_says():
  used = 'RESOURCE_EXHAUSTED: ... Used 17.92G of 15.75G hbm. Exceeded by 2.2G'
  assert measure.asked(used) == (17.92 * 2**30, 15.75 * 2**30)
  other = (
    'Ran out of memory on HBM, the total memory required for HLO temporaries '
    '(8.00T) exceeds available HBM (15.75G).'
  )
  assert measure.asked(other) == (8 * 2**40, 15.75 * 2**30)
  assert measure.asked('INVALID_ARGUMENT: no') is None


def test_a_row_of_the_table():
  told = {
    'size': '3B',
    'algo': 'ppo',
    'topology': 'v5e:4x4',
    'mesh': {'data': 1, 'fsdp': 8, 'tensor': 2},
    'memory': {'needed': 12.34e9, 'usable': 16.9e9, 'program': 'update'},
    'fits': True,
    'iteration': {
      'seconds': {'rollout': 1.23, 'score': 2.0, 'update': 3.0, 'all': 6.23},
      'compiler_seconds': 9.87,
      'tokens_per_second': 41091.2,
      'dollars': 0.0332,
    },
  }
  row = table.markdown([told]).splitlines()[-1]
  assert row == (
    '| 3B | ppo | v5e:4x4 | fsdp 8 x tensor 2 | 12.3 of 16.9 | update | 1.2, '
    '2.0, 3.0 | 9.9 | 41,091 | 0.033 |'
  )
  full = table.markdown([told | {'fits': False}]).splitlines()[-1]
  assert 'does not fit' in full and '41,091' not in full


def test_an_answer_ends_with_its_assumptions_and_the_flags_that_train_so():
  told = {
    'config': 'small, ppo',
    'topology': '2 x v5e:4x4',
    'chips': 32,
    'hosts': 8,
    'mesh': {'data': 2, 'fsdp': 8, 'tensor': 2},
    'microbatch': 16,
    'memory': {
      'usable': 16.9e9,
      'needed': 12e9,
      'by_formula': 11e9,
      'program': 'update',
      'parts': {'actor': 1e9, 'critic': 0.0},
    },
    'programs': [],
    'kernels': [],
    'fits': True,
    'iteration': {
      'seconds': {'rollout': 1.0, 'score': 2.0, 'update': 3.0, 'all': 6.0},
      'compiler_seconds': 9.0,
      'calls': 7,
      'tokens': 1000,
      'tokens_per_second': 166.7,
      'dollars': 0.05,
    },
    'efficiency': {'compute': 0.5, 'memory': 1.0, 'network': 1.0},
    'price': 0.9,
    'assumptions': 'Episodes are as given.',
    'flags': ['--config.mesh.fsdp=8', '--config.mesh.tensor=2'],
  }
  *_, assumed, times, _, last = table.describe(told).splitlines()
  assert assumed.startswith('Assumed: Episodes are as given. Of the peaks')
  assert '50% of compute' in assumed and 'hour: v5e $0.90.' in assumed
  assert 'at least 6 s' in times
  assert (
    last
    == 'To train what was counted: --config.mesh.fsdp=8 --config.mesh.tensor=2'
  )
  same = table.describe(told | {'flags': []})
  assert same.splitlines()[-1] == times
  assert 'nothing was compiled' in table.assumptions([{'refused': 'no'}])


def test_a_kept_cell_is_named_by_the_compiler_too(monkeypatch):
  where = topology.parse('v5e:2x2')
  question = cells.Question(
    paper.config(), paper.QWEN, where, paper.WORK, roofline.Efficiency()
  )
  names = []
  for version in ('0.0.42.1', '0.0.42.2', '0.0.42.1'):
    monkeypatch.setattr(
      importlib.metadata,
      'version',
      lambda name, version=version: version if name == 'libtpu' else '1',
    )
    names.append(question.key())
  assert names[0] != names[1] and names[0] == names[2]


def test_keys_have_a_size():
  key = jax.eval_shape(lambda: jax.random.key(0))
  mesh = mesh_lib.make_mesh()
  placed = jax.ShapeDtypeStruct(
    (), key.dtype, sharding=mesh_lib.replicated(mesh)
  )
  number = jax.ShapeDtypeStruct(
    (8, 4), jnp.bfloat16, sharding=mesh_lib.rows(mesh)
  )
  assert measure.per_chip([placed, number]) == 8 + 8
