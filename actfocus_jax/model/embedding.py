"""Embedding lookup in a sharded table, without gathering the table.

The rows of the table are sharded over `tensor` and its columns over `fsdp`:

1. The devices along `fsdp` gather their ids, a few bytes a token.
2. Each looks up its own columns for all these ids; 0 if another device has the
   row.
3. An all-to-all along `fsdp` gives every device all columns of its own ids, and
   a sum over `tensor` adds the rows of the other devices.

The backward pass mirrors this: each device sums the gradient of its own part,
and the parts are summed over `data`. Left to the compiler, tables were gathered
whole, on some meshes across slices over the slow network.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from actfocus_jax.parallel import mesh as mesh_lib

TABLE_SPEC = P('tensor', 'fsdp')


def embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
  """Return x_BTD, the rows of the table at the ids, in `dtype`.

  The table is sharded as `TABLE_SPEC` under a mesh. Without an ambient mesh
  (`jax.set_mesh`), or with a batch that does not divide over it, this is
  `jnp.take`. Ids past the vocabulary give NaN.
  """
  mesh = jax.sharding.get_abstract_mesh()
  is_local = mesh.empty or mesh.size == 1
  if is_local or tokens_BT.shape[0] % mesh_lib.row_shards(mesh):
    # Fills with NaN, so an id outside the vocabulary shows at once.
    return jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)

  def local(table_VD, tokens_BT):
    return _local_rows(table_VD, tokens_BT, dtype)

  x_BTD = jax.shard_map(
    local, in_specs=(TABLE_SPEC, mesh_lib.ROWS), out_specs=mesh_lib.ROWS
  )(table_VD, tokens_BT)
  is_known_BT = (tokens_BT >= 0) & (tokens_BT < table_VD.shape[0])
  return jnp.where(is_known_BT[..., None], x_BTD, jnp.nan)


def _local_rows(table_VD, tokens_BT, dtype: Any) -> jax.Array:
  """Return the rows of one device's ids, from its part of the table."""
  count = table_VD.shape[0]
  all_BT = jax.lax.all_gather(tokens_BT, 'fsdp', tiled=True)
  index_BT = all_BT - jax.lax.axis_index('tensor') * count
  is_own_BT = (index_BT >= 0) & (index_BT < count)
  # Negative indices would wrap.
  index_BT = jnp.where(is_own_BT, index_BT, count)
  x_BTD = jnp.take(table_VD, index_BT, axis=0, mode='fill', fill_value=0)
  x_BTD = jax.lax.all_to_all(
    x_BTD.astype(dtype), 'fsdp', split_axis=0, concat_axis=2, tiled=True
  )
  return jax.lax.psum(x_BTD, 'tensor')
