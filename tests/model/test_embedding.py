"""The exchange of embeddings against `jnp.take`, and what it sends."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from actfocus_jax.model import embedding
from actfocus_jax.parallel import mesh as mesh_lib

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2), (1, 1, 1)]
VOCABULARY, WIDTH = 48, 16


def placed(shape):
  """A mesh of that shape, with a table and ids on it."""
  data, fsdp, tensor = shape
  devices = jax.devices()[: data * fsdp * tensor]
  mesh = mesh_lib.make_mesh(
    data=data, fsdp=fsdp, tensor=tensor, devices=devices
  )
  rng = np.random.default_rng(0)
  table_VD = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
  tokens_BT = rng.integers(0, VOCABULARY, (8, 5)).astype(np.int32)
  table_VD = jax.device_put(table_VD, NamedSharding(mesh, embedding.TABLE_SPEC))
  return mesh, table_VD, mesh_lib.put_rows(mesh, tokens_BT)


@pytest.mark.parametrize('shape', MESHES)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_embed_equals_take_and_its_gradient_a_loop(shape, dtype):
  mesh, table_VD, tokens_BT = placed(shape)
  up_BTD = np.random.default_rng(1).normal(size=(*tokens_BT.shape, WIDTH))

  @jax.jit
  def both(table_VD):
    def loss(table_VD):
      x_BTD = embedding.embed(table_VD, tokens_BT, dtype)
      return (x_BTD.astype(jnp.float32) * up_BTD).sum(), x_BTD

    return jax.grad(loss, has_aux=True)(table_VD)

  with jax.set_mesh(mesh):
    grad_VD, x_BTD = both(table_VD)

  table, tokens = np.asarray(table_VD), np.asarray(tokens_BT)
  np.testing.assert_array_equal(
    x_BTD.astype(jnp.float32), jnp.asarray(table[tokens]).astype(dtype)
  )
  by_hand_VD = np.zeros_like(table)
  for b, t in np.ndindex(tokens.shape):  # An independent loop.
    by_hand_VD[tokens[b, t]] += up_BTD[b, t]
  tolerance = 1e-5 if dtype == jnp.float32 else 0.05
  np.testing.assert_allclose(grad_VD, by_hand_VD, atol=tolerance)
  assert grad_VD.sharding.is_equivalent_to(table_VD.sharding, 2)


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 2)])
def test_embed_gives_nan_only_past_the_vocabulary(shape):
  mesh, table_VD, tokens_BT = placed(shape)
  tokens_BT = tokens_BT.at[3, 2].set(VOCABULARY)
  with jax.set_mesh(mesh):
    x_BTD = embedding.embed(table_VD, tokens_BT, jnp.float32)
  is_nan_BTD = np.isnan(x_BTD)
  assert is_nan_BTD[3, 2].all()
  assert is_nan_BTD.sum() == WIDTH


def test_embed_gathers_no_table():
  mesh, table_VD, tokens_BT = placed((2, 2, 2))

  def loss(table_VD, tokens_BT):
    return embedding.embed(table_VD, tokens_BT, jnp.float32).sum()

  with jax.set_mesh(mesh):
    program = jax.jit(jax.grad(loss)).lower(table_VD, tokens_BT).compile()
  text = program.as_text()
  gathered = re.findall(r'= (\w+\[[\d,]*\])\S* all-gather', text)
  assert gathered  # The ids.
  assert all(shape.startswith('s32') for shape in gathered), gathered
