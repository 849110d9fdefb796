"""Which shapes are possible, and what a refusal says instead."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P

from actfocus_jax import build
from actfocus_jax.config import schema
from actfocus_jax.model import architecture, transformer
from actfocus_jax.parallel import mesh as meshes
from actfocus_jax.parallel import mesh_shapes

DEFAULT = dict(data=-1, fsdp=1, tensor=1, dcn_data=-1, dcn_fsdp=1)
QWEN = architecture.Config(151_936, 896, 4864, 24, 14, 2, 64)


def choose(per_slice, slices=1, splits=(), **sizes):
  return mesh_shapes.choose(DEFAULT | sizes, per_slice, slices, splits)


def near(count, splits=(), **sizes):
  shapes = mesh_shapes.nearest(DEFAULT | sizes, count, splits=splits)
  return [shape.inside for shape in shapes]


class Pretended(types.SimpleNamespace):
  """A device by its attributes; a mesh asks for its hash."""

  __hash__ = object.__hash__


def devices(slices, each, processes=1, platform='tpu'):
  """Things that look like devices of several slices: cubes of TPU, or nodes."""
  return [
    Pretended(
      id=i,
      platform=platform,
      device_kind='pretended',
      process_index=i // (each // processes),
      coords=(i % 2, i // 2 % 2, i % each // 4),
      core_on_chip=0,
      **({'slice_index': i // each} if slices > 1 else {}),
    )
    for i in range(slices * each)
  ]


def ids(array):
  return np.vectorize(lambda device: device.id)(array)


# --- Sizes -------------------------------------------------------------------


def test_sizes_over_slices_multiply_those_inside():
  shape = choose(8, 4, fsdp=4, dcn_fsdp=2)
  assert shape.inside == (2, 4, 1) and shape.outside == (2, 2, 1)
  assert shape.total == {'data': 4, 'fsdp': 8, 'tensor': 1}
  assert choose(8, 4, fsdp=-1, data=1).total['data'] == 4
  assert choose(8, 4, dcn_data=1, dcn_fsdp=-1).total['fsdp'] == 4
  assert choose(8).total == {'data': 8, 'fsdp': 1, 'tensor': 1}


@pytest.mark.parametrize(
  'sizes',
  [
    {'fsdp': 3},
    {'data': 4},
    {'fsdp': -1},
    {'tensor': 0},
    {'dcn_data': 2},
    {'dcn_fsdp': -1},
    {'dcn_fsdp': 3},
  ],
)
def test_what_does_not_multiply_is_refused(sizes):
  with pytest.raises(ValueError, match='does not fit 4 slices of 8 devices'):
    choose(8, 4, **sizes)


# --- Nearest -----------------------------------------------------------------


def test_the_nearest_come_first():
  assert near(8, data=3) == [(8, 1, 1), (4, 2, 1), (4, 1, 2)]
  # An open size is never far.
  assert near(8, fsdp=3)[0] == (2, 4, 1)
  # Of those equally far, the one with the smaller tensor.
  assert near(8, data=2, fsdp=2, tensor=4)[0] == (2, 2, 2)
  assert near(6, data=4, fsdp=1)[0] == (6, 1, 1)


def test_the_nearest_are_possible():
  """4 rows over 8 devices: at most 4 shards, the rest is tensor's."""
  splits = mesh_shapes.of_rows({'learner.microbatch': 4})
  for data, fsdp, tensor in near(8, splits, data=8):
    assert data * fsdp <= 4 and data * fsdp * tensor == 8
  # The model asks nothing more of 8: 896 = 2^7 * 7, and 2 key heads of 64 can
  # be cut in quarters.
  splits += QWEN.splits
  assert near(8, splits) == [(4, 1, 2), (2, 1, 4), (2, 2, 2)]
  assert near(24, splits) == []  # the 3 goes neither into rows nor heads


def test_a_refusal_names_them():
  splits = mesh_shapes.of_rows({'learner.microbatch': 4})
  with pytest.raises(
    ValueError,
    match=r'mesh data=8, fsdp=1, tensor=1 cannot cut learner.microbatch, 4,'
    r' into 8 equal parts \(data \* fsdp\); nearest that fit 8 devices .*:'
    r' data=4 fsdp=1 tensor=2, or ',
  ):
    choose(8, splits=splits, data=8)
  with pytest.raises(ValueError, match='no shape of 3 devices can'):
    choose(3, splits=splits + QWEN.splits)
  with pytest.raises(ValueError, match='data=1 fsdp=4 .* dcn_data=2 dcn_fsdp'):
    choose(4, 2, fsdp=3)
  with pytest.raises(ValueError, match=': data=4 .* dcn_data=1 dcn_fsdp=1'):
    choose(4, dcn_data=2)


def test_what_no_machine_can_is_refused_before_there_is_one():
  model = QWEN.splits
  mesh_shapes.check(DEFAULT | dict(fsdp=7), model)
  with pytest.raises(ValueError, match='hidden_size, 896, into 3 .* divisors'):
    mesh_shapes.check(DEFAULT | dict(fsdp=3), model)
  # The sizes over slices count too.
  with pytest.raises(ValueError, match='hidden_size, 896, into 6'):
    mesh_shapes.check(DEFAULT | dict(fsdp=2, dcn_fsdp=3), model)
  # With all sizes known, so are the devices.
  with pytest.raises(ValueError, match='fit 6 devices .*: data=3 fsdp=2 tens'):
    mesh_shapes.check(DEFAULT | dict(data=2, fsdp=3), model)


@pytest.mark.parametrize('tied', [True, False])
def test_the_sizes_of_a_model_are_those_of_its_parameters(tied):
  """What `Config.splits` allows without jax, the rules allow with it."""
  config = architecture.Config(96, 20, 72, 2, 4, 2, 6, tie_word_embeddings=tied)
  _, shapes = transformer.abstract(config, jnp.float32)
  allowed = []
  for fsdp, tensor in itertools.product(range(1, 9), repeat=2):
    if fsdp * tensor > 8:
      continue
    mesh = meshes.make_mesh(
      data=1,
      fsdp=fsdp,
      tensor=tensor,
      devices=jax.devices()[: fsdp * tensor],
    )
    try:
      meshes.param_shardings(mesh, transformer.PARTITION_RULES, shapes)
      allowed.append((fsdp, tensor))
    except ValueError as error:
      assert 'nearest that fit: data=' in str(error)
    try:
      mesh_shapes.check(DEFAULT | dict(fsdp=fsdp, tensor=tensor), config.splits)
      assert allowed[-1] == (fsdp, tensor)
    except ValueError:
      assert (fsdp, tensor) not in allowed
  assert (4, 2) in allowed and (5, 1) in allowed and (1, 8) not in allowed


# --- Slices ------------------------------------------------------------------


def test_devices_lie_as_the_hybrid_mesh_of_jax_has_them():
  for inside, outside in (
    ((2, 4, 1), (2, 2, 1)),
    ((1, 4, 2), (4, 1, 1)),
    ((2, 2, 2), (1, 4, 1)),
  ):
    shuffled = np.random.default_rng(0).permutation(devices(4, 8)).tolist()
    found = meshes.slices(shuffled)
    assert [d.slice_index for d in sum(found, [])] == sorted([0, 1, 2, 3] * 8)
    shape = mesh_shapes.Shape(*inside, *outside[:2])
    wanted = mesh_utils.create_hybrid_device_mesh(inside, outside, shuffled)
    array = meshes.arrange(found, shape)
    np.testing.assert_array_equal(ids(array), ids(wanted))
    assert array.shape == tuple(shape.total.values())
    # tensor stays within a slice.
    assert len({d.slice_index for d in array[0, 0]}) == 1


def test_processes_are_slices_where_somebody_asks():
  pool = devices(1, 8, processes=4)
  assert len(meshes.slices(pool)) == 1
  assert [len(part) for part in meshes.slices(pool, 4)] == [2] * 4
  first, _ = meshes.slices(pool, 2)
  assert [d.process_index for d in first] == [0, 0, 1, 1]
  with pytest.raises(ValueError, match='dcn_fsdp is 3, but.*a divisor of 4'):
    meshes.slices(pool, 3)
  with pytest.raises(ValueError, match='processes, 1, do not make 2 equal'):
    meshes.make_mesh(dcn_data=2)


def test_nodes_of_gpus_are_one_slice_until_somebody_asks():
  nodes = devices(2, 8, platform='gpu')
  assert {d.slice_index for d in nodes} == {0, 1}
  assert [len(part) for part in meshes.slices(nodes)] == [16]
  # So fsdp may go over nodes without a word about slices.
  whole = meshes.make_mesh(fsdp=16, devices=nodes)
  assert whole.shape['fsdp'] == 16 and meshes.slice_count(whole) == 1
  assert [len(part) for part in meshes.slices(nodes, 2)] == [8, 8]
  with pytest.raises(ValueError, match='2 slices of 8 devices'):
    meshes.make_mesh(fsdp=16, devices=devices(2, 8))


def test_what_does_not_divide_over_slices_is_told_shapes_that_slices_have():
  mesh = meshes.make_mesh(tensor=8, devices=devices(2, 8))
  leaf = jax.ShapeDtypeStruct((12,), np.float32)
  with pytest.raises(
    ValueError,
    match='nearest that fit: data=2 fsdp=1 tensor=4 dcn_data=2 dcn_fsdp=1, or',
  ):
    meshes.param_shardings(mesh, [('', P('tensor'))], {'a': leaf})


@pytest.mark.parametrize(
  ('made', 'dcn_data', 'ends_early'),
  [(devices(1, 8), -1, True), (devices(2, 8), -1, False)]
  + [(devices(2, 8, platform='gpu'), n, n < 2) for n in (-1, 1, 2)],
)
def test_decoding_ends_early_where_no_slow_network_is_asked(
  made, dcn_data, ends_early
):
  c = schema.defaults()
  c.mesh.dcn_data = dcn_data
  mesh = meshes.make_mesh(devices=made, dcn_data=dcn_data)
  collector = build.collector(c, None, (), mesh, None)
  assert collector.ends_early is ends_early


def test_unequal_slices_are_refused():
  with pytest.raises(ValueError, match=r'\[8, 4\] devices'):
    meshes.slices(devices(2, 8)[:12])
