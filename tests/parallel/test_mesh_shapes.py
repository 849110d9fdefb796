"""Mesh shapes: possible ones, nearest ones, slices."""

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
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.parallel import mesh_shapes

DEFAULT = dict(data=-1, fsdp=1, tensor=1, dcn_data=-1, dcn_fsdp=1)
QWEN = architecture.Config(151_936, 896, 4864, 24, 14, 2, 64)


def choose(per_slice, slices=1, splits=(), **sizes):
  return mesh_shapes.choose(DEFAULT | sizes, per_slice, slices, splits)


def near(count, splits=(), **sizes):
  shapes = mesh_shapes.nearest(DEFAULT | sizes, count, splits=splits)
  return [shape.inside for shape in shapes]


class FakeDevice(types.SimpleNamespace):
  """Device by its attributes; a mesh needs its hash."""

  __hash__ = object.__hash__


def devices(slices, each, processes=1, platform='tpu'):
  """Fake devices of several slices: cubes of a TPU, or nodes."""
  return [
    FakeDevice(
      id=i,
      platform=platform,
      device_kind='fake',
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


def test_choose_axis_is_the_product_inside_and_over_slices():
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
def test_choose_sizes_that_do_not_multiply_are_refused(sizes):
  with pytest.raises(ValueError, match='does not fit 4 slices of 8 devices'):
    choose(8, 4, **sizes)


# --- Nearest -----------------------------------------------------------------


def test_nearest_by_hand():
  assert near(8, data=3) == [(8, 1, 1), (4, 2, 1), (4, 1, 2)]
  # An open size is never far.
  assert near(8, fsdp=3)[0] == (2, 4, 1)
  # At equal distance the smaller tensor comes first.
  assert near(8, data=2, fsdp=2, tensor=4)[0] == (2, 2, 2)
  assert near(6, data=4, fsdp=1)[0] == (6, 1, 1)


def test_nearest_shapes_fit_the_splits():
  """4 rows over 8 devices: at most 4 shards, the rest is tensor's."""
  splits = mesh_shapes.row_splits({'learner.microbatch': 4})
  for data, fsdp, tensor in near(8, splits, data=8):
    assert data * fsdp <= 4 and data * fsdp * tensor == 8
  # The model fits any of these: 896 = 2^7 * 7, and 2 key heads of 64 can be cut
  # in quarters.
  splits += QWEN.splits
  assert near(8, splits) == [(4, 1, 2), (2, 1, 4), (2, 2, 2)]
  assert near(24, splits) == []  # 3 divides neither rows nor heads


def test_choose_refusal_names_the_nearest():
  splits = mesh_shapes.row_splits({'learner.microbatch': 4})
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


def test_check_sizes_uneven_on_any_machine_are_refused():
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
def test_splits_of_a_model_allow_what_its_rules_allow(tied):
  config = architecture.Config(96, 20, 72, 2, 4, 2, 6, tie_word_embeddings=tied)
  _, shapes = transformer.abstract(config, jnp.float32)
  allowed = []
  for fsdp, tensor in itertools.product(range(1, 9), repeat=2):
    if fsdp * tensor > 8:
      continue
    mesh = mesh_lib.make_mesh(
      data=1,
      fsdp=fsdp,
      tensor=tensor,
      devices=jax.devices()[: fsdp * tensor],
    )
    try:
      mesh_lib.param_shardings(mesh, transformer.PARTITION_RULES, shapes)
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


def test_arrange_equals_the_hybrid_mesh_of_jax():
  for inside, outside in (
    ((2, 4, 1), (2, 2, 1)),
    ((1, 4, 2), (4, 1, 1)),
    ((2, 2, 2), (1, 4, 1)),
  ):
    shuffled = np.random.default_rng(0).permutation(devices(4, 8)).tolist()
    parts = mesh_lib.slices(shuffled)
    assert [d.slice_index for d in sum(parts, [])] == sorted([0, 1, 2, 3] * 8)
    shape = mesh_shapes.Shape(*inside, *outside[:2])
    wanted = mesh_utils.create_hybrid_device_mesh(inside, outside, shuffled)
    array = mesh_lib.arrange(parts, shape)
    np.testing.assert_array_equal(ids(array), ids(wanted))
    assert array.shape == tuple(shape.total.values())
    # tensor stays within a slice.
    assert len({d.slice_index for d in array[0, 0]}) == 1


def test_slices_of_processes_if_wanted():
  pool = devices(1, 8, processes=4)
  assert len(mesh_lib.slices(pool)) == 1
  assert [len(part) for part in mesh_lib.slices(pool, 4)] == [2] * 4
  first, _ = mesh_lib.slices(pool, 2)
  assert [d.process_index for d in first] == [0, 0, 1, 1]
  with pytest.raises(ValueError, match='dcn_fsdp is 3, but.*a divisor of 4'):
    mesh_lib.slices(pool, 3)
  with pytest.raises(ValueError, match='1 processes do not form 2 equal'):
    mesh_lib.make_mesh(dcn_data=2)


def test_slices_gpu_nodes_are_one_slice_by_default():
  nodes = devices(2, 8, platform='gpu')
  assert {d.slice_index for d in nodes} == {0, 1}
  assert [len(part) for part in mesh_lib.slices(nodes)] == [16]
  # So fsdp may span nodes without sizes over slices.
  whole = mesh_lib.make_mesh(fsdp=16, devices=nodes)
  assert whole.shape['fsdp'] == 16 and mesh_lib.slice_count(whole) == 1
  assert [len(part) for part in mesh_lib.slices(nodes, 2)] == [8, 8]
  with pytest.raises(ValueError, match='2 slices of 8 devices'):
    mesh_lib.make_mesh(fsdp=16, devices=devices(2, 8))


def test_param_shardings_uneven_over_slices_names_the_nearest():
  mesh = mesh_lib.make_mesh(tensor=8, devices=devices(2, 8))
  leaf = jax.ShapeDtypeStruct((12,), np.float32)
  with pytest.raises(
    ValueError,
    match='nearest that fit: data=2 fsdp=1 tensor=4 dcn_data=2 dcn_fsdp=1, or',
  ):
    mesh_lib.param_shardings(mesh, [('', P('tensor'))], {'a': leaf})


@pytest.mark.parametrize(
  ('made', 'dcn_data', 'ends_early'),
  [(devices(1, 8), -1, True), (devices(2, 8), -1, False)]
  + [(devices(2, 8, platform='gpu'), n, n < 2) for n in (-1, 1, 2)],
)
def test_decoding_ends_early_only_on_one_slice(made, dcn_data, ends_early):
  c = schema.defaults()
  c.mesh.dcn_data = dcn_data
  mesh = mesh_lib.make_mesh(devices=made, dcn_data=dcn_data)
  collector = build.collector(c, None, (), mesh, None)
  assert collector.ends_early is ends_early


def test_slices_unequal_are_refused():
  with pytest.raises(ValueError, match=r'\[8, 4\] devices'):
    mesh_lib.slices(devices(2, 8)[:12])
