"""Rows of a table that lies over the devices, without moving the table.

The life of one batch of ids, where the table's rows lie over `tensor` and its
columns over `fsdp`:

1. The devices along `fsdp` tell each other their ids, a few bytes a token.
2. Each looks up the columns it has, for the ids of all of them; 0 where the row
   is another's.
3. One exchange along `fsdp` brings every device all columns of its own ids, and
   a sum over `tensor` the rows that others have.

Backwards it is the same way: each device adds up the gradient of its own part,
and parts are summed over `data`. Left to the compiler, tables were gathered
whole, on some meshes from other slices, over the slow network.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from actfocus_jax.parallel import mesh as meshes

TABLE = P('tensor', 'fsdp')


def embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
  """Returns x_BTD, the rows of the table at the ids, in `dtype`.

  Without an ambient mesh (`jax.set_mesh`), or with rows that do not divide over
  it, this is `jnp.take`.

  Args:
    table_VD: Laid out as `TABLE` under a mesh.
    tokens_BT: int32 ids from 0 on; those past the vocabulary give NaN.
    dtype: Of the result.
  """
  mesh = jax.sharding.get_abstract_mesh()
  is_alone = mesh.empty or mesh.size == 1
  if is_alone or tokens_BT.shape[0] % meshes.row_shards(mesh):
    # Fills with NaN: an id outside the vocabulary is seen at once.
    return jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)

  def own(table_VD, tokens_BT):
    return _exchanged(table_VD, tokens_BT, dtype)

  x_BTD = jax.shard_map(
    own, in_specs=(TABLE, meshes.ROWS), out_specs=meshes.ROWS
  )(table_VD, tokens_BT)
  is_known_BT = (tokens_BT >= 0) & (tokens_BT < table_VD.shape[0])
  return jnp.where(is_known_BT[..., None], x_BTD, jnp.nan)


def _exchanged(table_VD, tokens_BT, dtype: Any) -> jax.Array:
  """What one device does: its part of the table, its rows of ids."""
  count = table_VD.shape[0]
  all_BT = jax.lax.all_gather(tokens_BT, 'fsdp', tiled=True)
  index_BT = all_BT - jax.lax.axis_index('tensor') * count
  is_own_BT = (index_BT >= 0) & (index_BT < count)
  index_BT = jnp.where(is_own_BT, index_BT, count)  # Negative ones would wrap.
  x_BTD = jnp.take(table_VD, index_BT, axis=0, mode='fill', fill_value=0)
  x_BTD = jax.lax.all_to_all(
    x_BTD.astype(dtype), 'fsdp', split_axis=0, concat_axis=2, tiled=True
  )
  return jax.lax.psum(x_BTD, 'tensor')
