"""Batches cut into parts along their rows, each part over all devices.

There are two ways to cut. `consecutive` decides which rows an optimizer step
reads, which must not depend on the mesh: rows move between devices. `micro`
only decides which rows are in memory together: each device cuts the rows that
it holds, and no row moves.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from actfocus_jax.parallel import mesh as mesh_lib


def consecutive(tree: Any, size: int) -> Any:
  """[B, ...] -> [B / size, size, ...]; part i begins at row i * size."""
  return jax.tree.map(
    lambda x: _keep_parts(x.reshape(-1, size, *x.shape[1:])), tree
  )


def micro(tree: Any, size: int) -> Any:
  """[B, ...] -> [B / size, size, ...]; equally many rows per device in a part.

  On one device, and where the row shards do not divide `size`, these are the
  parts of `consecutive`.
  """
  shards = _shards(size)

  def cut(x):
    rows = x.reshape(shards, -1, size // shards, *x.shape[1:])
    return _keep_parts(rows.swapaxes(0, 1).reshape(-1, size, *x.shape[1:]))

  return jax.tree.map(cut, tree)


def join(tree: Any) -> Any:
  """[parts, size, ...] -> [parts * size, ...]: the inverse of `micro`."""

  def join_array(x):
    parts, size = x.shape[:2]
    shards = _shards(size)
    rows = x.reshape(parts, shards, size // shards, *x.shape[2:])
    return mesh_lib.constrain_rows(
      rows.swapaxes(0, 1).reshape(-1, *x.shape[2:])
    )

  return jax.tree.map(join_array, tree)


def _shards(size: int) -> int:
  """Number of devices that the rows of a part of `size` are spread over."""
  shards = mesh_lib.row_shards(jax.sharding.get_abstract_mesh())
  return 1 if size % shards else shards


def _keep_parts(x: jax.Array) -> jax.Array:
  """Apply `mesh_lib.constrain_rows` to each part."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(None, *mesh_lib.ROWS))
