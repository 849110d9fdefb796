"""Meshes, rules and layouts on eight CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from actfocus_jax.model import architecture, transformer
from actfocus_jax.parallel import mesh as mesh_lib

CONFIG = architecture.Config(
  96, 32, 48, 2, 4, 2, 8, rope_theta=100.0, tie_word_embeddings=False
)


def test_make_mesh_minus_one_is_the_rest():
  mesh = mesh_lib.make_mesh(fsdp=2, tensor=2)
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}
  assert dict(mesh_lib.make_mesh(data=1, fsdp=-1).shape)['fsdp'] == 8
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert mesh_lib.make_mesh(devices=jax.devices()[:1]).size == 1


def test_match_rules_first_match_wins():
  params = {'a': {'kernel': jnp.zeros((2, 2))}, 'step': jnp.zeros(())}
  rules = [('a/kernel', P('fsdp')), ('kernel', P('tensor'))]
  assert mesh_lib.match_rules(rules, params) == {
    'a': {'kernel': P('fsdp')},
    'step': P(),
  }


def test_match_rules_parameter_without_a_rule_is_named():
  with pytest.raises(ValueError, match=r'parameter a/bias .* no rule'):
    mesh_lib.match_rules([('kernel', P())], {'a': {'bias': jnp.zeros(3)}})
  with pytest.raises(ValueError, match='a/bias .* too long'):
    mesh_lib.match_rules(
      [('bias', P('data', None))], {'a': {'bias': jnp.zeros(3)}}
    )


def test_param_shardings_uneven_parameter_is_named():
  mesh = mesh_lib.make_mesh(fsdp=2)
  with pytest.raises(ValueError, match=r'parameter a of shape \(3,\) cannot'):
    mesh_lib.param_shardings(mesh, [('a', P('fsdp'))], {'a': jnp.zeros(3)})


def test_partition_rules_leave_only_norms_and_biases_whole():
  _, shapes = transformer.abstract(CONFIG, jnp.float32)
  mesh = mesh_lib.make_mesh(fsdp=8)
  named = mesh_lib.param_shardings(mesh, transformer.PARTITION_RULES, shapes)
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(shapes),
    jax.tree.leaves(named),
    strict=True,
  )
  for (path, leaf), sharding in pairs:
    whole = sharding.shard_shape(leaf.shape) == leaf.shape
    name = mesh_lib.path_name(path)
    assert whole == name.endswith(('scale', 'bias')), name


def test_put_rows_splits_rows():
  mesh = mesh_lib.make_mesh(fsdp=2, tensor=2)
  host = {'x': np.arange(12).reshape(4, 3), 'ok': np.array([1, 0, 1, 1], bool)}
  tree = mesh_lib.put_rows(mesh, host)
  assert tree['x'].sharding == mesh_lib.rows(mesh)
  assert tree['x'].addressable_shards[0].data.shape == (1, 3)
  jax.tree.map(np.testing.assert_array_equal, tree, host)
  with pytest.raises(ValueError, match='6 rows do not divide over 4'):
    mesh_lib.put_rows(mesh, np.zeros(6))


def test_constrain_rows_splits_rows_on_a_mesh():
  mesh = mesh_lib.make_mesh(fsdp=2, tensor=2)
  pin = jax.jit(lambda x: mesh_lib.constrain_rows(x) + 1.0)
  with jax.set_mesh(mesh):
    assert pin(jnp.zeros((8, 2))).sharding.shard_shape((8, 2)) == (2, 2)
    # Rows that do not divide are allowed: the last shards hold fewer.
    np.testing.assert_array_equal(pin(jnp.zeros((3, 2))), 1.0)
  np.testing.assert_array_equal(pin(jnp.zeros((8, 2))), 1.0)


def test_embedding_split_by_columns_is_never_gathered():
  """Neither the table nor its gradient is whole on a device."""
  config = architecture.Config(704, 64, 96, 1, 4, 2, 8)
  mesh = mesh_lib.make_mesh(data=2, fsdp=4)
  graphdef, params = transformer.create(
    config, mesh, jax.random.key(0), dtype=jnp.float32
  )

  def loss(params, tokens_BT):
    return nnx.merge(graphdef, params).hidden(tokens_BT).sum()

  with jax.set_mesh(mesh):
    rows = mesh_lib.put_rows(mesh, np.zeros((8, 6), np.int32))
    text = jax.jit(jax.grad(loss)).lower(params, rows).compile().as_text()
  assert 'f32[704,16]' in text and 'f32[704,64]' not in text


def test_decode_layout_is_cast_without_fsdp():
  mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
  _, params = transformer.create(
    CONFIG, mesh, jax.random.key(0), dtype=jnp.float32
  )
  copy = mesh_lib.decode_layout(params, mesh, jnp.bfloat16)
  before = params['layers']['o']['kernel'][...]
  after = copy['layers']['o']['kernel'][...]
  assert before.addressable_shards[0].data.shape == (2, 16, 16)
  assert after.addressable_shards[0].data.shape == (2, 16, 32)
  assert after.dtype == jnp.bfloat16
  np.testing.assert_array_equal(after, before.astype(jnp.bfloat16))


def test_decode_layout_compiles_once_and_shares_nothing():
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  _, params = transformer.create(
    CONFIG, mesh, jax.random.key(0), dtype=jnp.float32
  )
  first = mesh_lib.decode_layout(params, mesh, jnp.float32)
  misses = mesh_lib.recast.cache_info().misses
  mesh_lib.decode_layout(params, mesh, jnp.float32)
  assert mesh_lib.recast.cache_info().misses == misses
  ours, copy = params['embedding'][...], first['embedding'][...]
  assert ours.unsafe_buffer_pointer() != copy.unsafe_buffer_pointer()
