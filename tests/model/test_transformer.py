"""The model: its cache, its masks, its dtypes, its initial parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from actfocus_jax.model import transformer
from actfocus_jax.parallel import mesh as mesh_lib

TOKENS = np.random.default_rng(0).integers(0, 96, (3, 11), np.int32)


def _logits(graphdef, params, tokens):
  model = nnx.merge(graphdef, params)
  return model.unembed(model.hidden(tokens))


logits = jax.jit(_logits)


def _extend(graphdef, params, tokens, start, cache, view):
  return nnx.merge(graphdef, params).extend(tokens, start, cache, view=view)


extend = jax.jit(_extend, static_argnames='view')


def test_cached_extend_equals_full_forward(tied):
  """Ragged turns: each row adds its own number of tokens, padded with junk."""
  config, graphdef, params = tied
  full = np.asarray(nnx.merge(graphdef, params).hidden(TOKENS))
  cache = transformer.init_cache(config, 3, 16, jnp.float32)
  done = np.zeros(3, np.int32)
  for counts, view in (
    ((4, 2, 3), 8),
    ((1, 1, 1), 8),
    ((5, 0, 3), 16),
    ((1, 8, 4), 12),
  ):
    width = max(counts)
    tokens = np.full((3, width), 95, np.int32)
    for b, n in enumerate(counts):
      tokens[b, :n] = TOKENS[b, done[b] : done[b] + n]
    hidden, cache = extend(graphdef, params, tokens, done, cache, view)
    for b, n in enumerate(counts):
      np.testing.assert_allclose(
        hidden[b, :n], full[b, done[b] : done[b] + n], atol=2e-5
      )
    done += np.array(counts, np.int32)
  np.testing.assert_array_equal(done, 11)


def test_writes_past_the_cache_are_dropped(tied):
  config, graphdef, params = tied
  cache = transformer.init_cache(config, 3, 4, jnp.float32)
  cache = jax.tree.map(lambda x: x + 5.0, cache)
  start = jnp.array([4, 2, 0])
  _, after = extend(graphdef, params, TOKENS[:, :3], start, cache, 4)
  written = np.any(np.asarray(after.k_BLSN) != 5.0, axis=(1, 3))
  np.testing.assert_array_equal(
    written, [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 0]]
  )


def test_causality_by_gradient(tied):
  """What is read at position 4 moves with inputs 0..4 and with no other."""
  _, graphdef, params = tied
  # One embedding row per position, so that gradients do not mix.
  tokens = np.arange(10, dtype=np.int32)[None, :]

  def read(params):
    return jnp.sum(jnp.sin(nnx.merge(graphdef, params).hidden(tokens)[0, 4]))

  gradient = jax.jit(jax.grad(read))(params)['embedding'][...]
  moved = np.max(np.abs(np.asarray(gradient[:10])), axis=-1)
  assert np.all(moved[:5] > 1e-5)
  np.testing.assert_array_equal(moved[5:], 0.0)


def test_remat_changes_memory_not_gradients(tied):
  config, graphdef, params = tied
  recompute, _ = transformer.abstract(config, jnp.float32, remat=True)

  def loss(params, graphdef):
    return jnp.mean(jnp.square(_logits(graphdef, params, TOKENS)))

  def gradient(graphdef):
    return jax.jit(lambda p: jax.grad(loss)(p, graphdef))

  plain, remat = gradient(graphdef), gradient(recompute)
  kept = 'f32[2,3,11,48]'  # Hidden units of every layer, for the way back.
  assert kept in str(jax.make_jaxpr(plain)(params))
  assert kept not in str(jax.make_jaxpr(remat)(params))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    plain(params),
    remat(params),
  )


def test_bfloat16_is_close_to_float32(tied):
  config, _, params = tied
  graphdef, _ = transformer.abstract(config, jnp.bfloat16)
  model = nnx.merge(graphdef, params)
  assert model.hidden(TOKENS).dtype == jnp.bfloat16
  found = np.asarray(logits(graphdef, params, TOKENS))
  assert found.dtype == np.float32
  exact = np.asarray(logits(tied[1], params, TOKENS))
  error = np.abs(found - exact)
  assert error.max() > 1e-3 and error.mean() < 0.05 * np.std(exact)
  cache = transformer.init_cache(config, 3, 16, jnp.bfloat16)
  hidden, cache = extend(
    graphdef, params, TOKENS[:, :1], jnp.zeros(3, int), cache, 16
  )
  assert hidden.dtype == cache.k_BLSN.dtype == jnp.bfloat16
  assert np.all(np.isfinite(np.asarray(hidden, np.float32)))


def test_initialisation(untied):
  config, _, _ = untied
  config = dataclasses.replace(config, initializer_range=0.5)
  _, params = transformer.create(
    config, mesh_lib.make_mesh(), jax.random.key(1), dtype=jnp.float32
  )
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  for path, leaf in leaves:
    name = mesh_lib.path_name(path)
    if name.endswith('scale'):
      np.testing.assert_array_equal(leaf, 1.0)
    elif name.endswith('bias'):
      np.testing.assert_array_equal(leaf, 0.0)
    else:
      assert abs(float(jnp.std(leaf)) - 0.5) < 0.05, name
  # Layers are drawn apart.
  kernel = np.asarray(params['layers']['q']['kernel'][...])
  assert np.abs(kernel[0] - kernel[1]).mean() > 0.1


def test_eight_devices_equal_one(untied):
  config, graphdef, params = untied
  mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
  where = mesh_lib.param_shardings(mesh, transformer.PARTITION_RULES, params)
  spread = jax.device_put(params, where)
  kernel = spread['layers']['gate']['kernel'][...]
  assert kernel.addressable_shards[0].data.shape == (2, 16, 24)
  table = spread['embedding'][...]
  assert table.addressable_shards[0].data.shape == (48, 16)
  tokens = np.concatenate([TOKENS, TOKENS[:1, ::-1]])
  one = logits(graphdef, params, tokens)
  with jax.set_mesh(mesh):
    eight = logits(graphdef, spread, mesh_lib.put_rows(mesh, tokens))
    ragged = logits(graphdef, spread, tokens[:3])
  assert eight.sharding.shard_shape(eight.shape)[0] == 1
  np.testing.assert_allclose(one, np.asarray(eight), atol=2e-5)
  np.testing.assert_allclose(one[:3], np.asarray(ragged), atol=2e-5)


def test_parameters_do_not_depend_on_the_mesh(tied):
  config, _, _ = tied
  one, eight = (
    transformer.create(config, mesh, jax.random.key(3), dtype=jnp.float32)[1]
    for mesh in (
      mesh_lib.make_mesh(devices=jax.devices()[:1]),
      mesh_lib.make_mesh(data=2, fsdp=2, tensor=2),
    )
  )
  jax.tree.map(np.testing.assert_array_equal, one, eight)
  assert len(eight['embedding'][...].sharding.device_set) == 8
