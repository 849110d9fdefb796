"""Topologies, how long episodes are, and which mesh is taken, by hand."""

import dataclasses
import math

import pytest
from aot import paper

from actfocus_jax import errors
from actfocus_jax.aot import (
  chips,
  choice,
  ranking,
  topology,
  workload,
)
from actfocus_jax.parallel import mesh_shapes

# --- Topologies --------------------------------------------------------------


def test_a_topology_counts_its_chips():
  where = topology.parse('v5p:2x2x4')
  assert (where.chips, where.pool, str(where)) == (16, 4, 'v5p:2x2x4')
  assert where.sizes == (2, 2, 4)
  where = topology.parse('v5e:16x16', slices=16)
  assert (where.chips, where.pool) == (4096, 1024)
  assert str(where) == '16 x v5e:16x16'
  assert topology.parse('v5e:1x1').pool == 1


def test_eight_flat_chips_are_one_host():
  pool = {
    name: topology.parse(name).pool
    for name in ('v5e:2x4', 'v6e:2x4', 'v6e:4x4', 'v5p:2x2x2', 'v5p:2x2x1')
  }
  assert list(pool.values()) == [1, 1, 4, 2, 1]
  assert topology.parse('v5e:2x4', slices=2).pool == 2


@pytest.mark.parametrize('kind', chips.CHIPS)
def test_slices_are_listed_from_the_smallest_on(kind):
  sizes = [where.chips for where in topology.all_of(kind)]
  assert sizes == sorted(set(sizes))


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
  with pytest.raises(errors.UsageError, match=sentence):
    topology.parse(text, slices)


# --- Workload ----------------------------------------------------------------


def test_the_calls_of_an_episode():
  # 10 + 20, observation 5, 20, 5, then 10 of the 20 that the context leaves.
  work = workload.Workload(10, 5, 20, 4, context=70, steps=8)
  assert work.length == 70
  assert work.sampled == 20 + 20 + 10
  # 8, 8 and 4 ids of the first two turns, 8 and 2 of the last one.
  assert work.decoding() == dict.fromkeys((18, 26, 30, 43, 51, 55, 68, 70), 1.0)
  # Each prefill takes a quarter of the slots, so four are the least.
  assert work.turn_ends() == {35: 4.0, 60: 4.0}
  assert work.sampled_share(100) == 0.5


# --- Which mesh --------------------------------------------------------------


def test_the_fastest_mesh_comes_first():
  where = topology.parse('v5e:2x4')
  found = choice.candidates(paper.config(), paper.QWEN, where, paper.WORK)
  assert all(math.prod(one.shape.inside) == 8 for one in found)
  seconds = [one.seconds for one in found]
  assert seconds == sorted(seconds)
  # Reading a half of the weights at each step is faster than all of them; a
  # quarter is not, for there are 2 key heads: twice the slots, as much of each.
  tensor = {one.shape.tensor: one.seconds for one in reversed(found)}
  assert found[0].shape.tensor == 2
  assert tensor[1] > tensor[2] < tensor[4] < tensor[8]
  # What is not split need not be gathered.
  assert found[0].shape.fsdp == 1
  assert [one.c.learner.microbatch for one in found[:2]] == [4, 4]
  memory = min(one.by_formula for one in found)
  tried = choice.promising(found, memory)
  assert tried[0].by_formula == memory
  assert choice.promising(found, memory / 100) == []


def test_the_flags_that_train_on_a_mesh():
  """Only what differs: an open size becomes the rest by itself."""
  where, c = topology.parse('v5e:4x4', slices=2), paper.config()
  for one in choice.candidates(c, paper.QWEN, where, paper.WORK):
    if one.shape.inside == (4, 2, 2):
      assert one.flags(c) == [
        '--config.learner.fused=False',
        '--config.learner.microbatch=16',
        '--config.mesh.fsdp=2',
        '--config.mesh.tensor=2',
      ]
      return
  pytest.fail('no such mesh')


def test_mini_batches_bound_the_rows():
  # 32 rows are trained on: more than 32 row shards need a tensor axis. The 8
  # prompts do not bound them.
  where = topology.parse('v5e:8x8')
  shards = {
    one.shape.data * one.shape.fsdp
    for one in choice.candidates(paper.config(), paper.QWEN, where, paper.WORK)
  }
  assert max(shards) == 32


def test_seconds_by_hand():
  """3B on four chips: what is read at each step, what is multiplied."""
  where = topology.parse('v5e:2x2')
  shape = mesh_shapes.Shape(4, 1, 1)
  c = paper.config('grpo')
  c.learner.microbatch = 32
  found = ranking.seconds(c, paper.QWEN, shape, where, paper.WORK)
  # 32 slots a chip: 36 layers, keys and values of 2 heads of 128 numbers. Of
  # 250 calls to decode, 8 steps each, 50 end below 1,024 positions, 100 below
  # 2,048; the others read all 3,712.
  count = 3_085_938_688
  position = 32 * 36 * 2 * 256 * 2
  read = 250 * 2 * count + (50 * 1024 + 100 * 2048 + 100 * 3712) * position
  decoding = 8 * read / 819e9
  # A quarter of the slots takes 128 tokens in, 50 times after each of 4 turns;
  # that multiplies longer than it moves the cache.
  decoding += 200 * 2 * count * 8 * 128 / 197e12
  assert 2 * count + 4 * 3712 * position < 819e9 * 2 * count * 1024 / 197e12
  # GRPO: policy and reference score, the policy learns (4 passes), 8 rows each.
  products = 2 * count * 8 * 3024 * (2 + 4) / 197e12
  assert found == pytest.approx(decoding + products, rel=1e-6)


def test_seconds_of_the_network_by_hand():
  """Likewise on chips that take no time: along lines of 4, 2 and 2 of 4 x 4."""
  fast = dataclasses.replace(chips.CHIPS['v5e'], flops=1e30, hbm_bandwidth=1e30)
  where = topology.Topology(fast, '4x4')
  shape = mesh_shapes.Shape(2, 2, 4)
  c = paper.config('grpo')
  c.learner.microbatch = 32
  found = ranking.seconds(c, paper.QWEN, shape, where, paper.WORK)
  count, link = 3_085_938_688, 200e9 / 4
  # 2 sums in 36 layers, 3 hops there and back, and 2 gathers of keys and values
  # for 4 parts of 2 heads.
  decoding = 2000 * 36 * (2 * 6 + 2 * 3) * 1e-6
  # 200 prefills of 8 x 128 tokens.
  sent = 2 * 8 * 128 * 2048 * 2 * 3 / 4
  decoding += 200 * 36 * (2 * sent / link + 2 * 3 * 1e-6)
  # 2 models score and 1 learns in 3 passes, 8 rows each.
  sums = (2 + 3) * 36 * 2 * (2 * 8 * 3024 * 2048 * 2 * 3 / 4) / link
  gathered = (2 + 3) * count * 2 / 4 / 2 / link
  gradients = (count * 4 / 4 / 2 + 2 * count * 4 / 4 / 2 / 2) / link
  assert found == pytest.approx(
    decoding + sums + gathered + gradients, rel=1e-6
  )


@pytest.mark.parametrize(('name', 'copies'), [('v5e', 4), ('v5p', 10)])
def test_seconds_of_the_memory_by_hand(name, copies):
  """Likewise where products and links take no time: 8 x tensor holds more."""
  fast = dataclasses.replace(
    chips.CHIPS['v5e'], name=name, flops=1e30, ici_bandwidth=1e30
  )
  where = topology.Topology(fast, '4x4')
  c = paper.config('grpo')
  c.learner.microbatch = 32
  shape = mesh_shapes.Shape(2, 1, 8)
  found = ranking.seconds(c, paper.QWEN, shape, where, paper.WORK)
  # 64 slots a chip, of whose 2 key heads each of 8 chips holds one of 128
  # numbers; calls by view as above, and 50 prefills at the ends of 4 turns: at
  # 1,040 and 1,568 positions below 2,048, at 2,096 and 2,624 below 3,712.
  weights, position = 3_085_938_688 * 2 / 8, 64 * 36 * 2 * 128 * 2
  seen = 50 * 1024 + 100 * 2048 + 100 * 3712
  moved = 8 * (250 * weights + seen * position)
  moved += 200 * weights + copies * 100 * (2048 + 3712) * position
  # 2 models score and 1 learns in 3 passes: sums of 4 hops, there and back.
  hops = (2 + 3) * 36 * 2 * 2 * 4 * 1e-6
  assert found == pytest.approx(moved / 819e9 + hops, rel=1e-6)


def test_the_mesh_of_the_config_must_fit():
  c = paper.config()
  c.mesh.fsdp = 3
  with pytest.raises(errors.UsageError, match='On v5e:4x4: mesh .*fsdp=3'):
    choice.given(c, paper.QWEN, topology.parse('v5e:4x4'), paper.WORK)
  c.mesh.update(fsdp=8, tensor=2)
  with pytest.raises(errors.UsageError, match='microbatch, 4, into 8'):
    choice.given(c, paper.QWEN, topology.parse('v5e:4x4'), paper.WORK)
  c.learner.microbatch = 8
  given = choice.given(c, paper.QWEN, topology.parse('v5e:4x4'), paper.WORK)
  assert given.shape.inside == (1, 8, 2)
  # Its `data` was open: the rest.
  assert given.flags(c) == ['--config.learner.fused=False']
