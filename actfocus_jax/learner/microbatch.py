"""Batches cut into parts along their rows, each part over all devices.

Two ways to cut. `consecutive` decides which rows an optimizer step reads, which
no mesh may change: rows move between devices. `micro` only decides what is in
memory together, so each device cuts the rows that it holds, and none moves.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from actfocus_jax.parallel import mesh as meshes


def consecutive(tree: Any, size: int) -> Any:
  """[B, ...] -> [B / size, size, ...]; part i holds rows i * size and on."""
  return jax.tree.map(
    lambda x: _keep_parts(x.reshape(-1, size, *x.shape[1:])), tree
  )


def micro(tree: Any, size: int) -> Any:
  """[B, ...] -> [B / size, size, ...]; a part has as many rows of each device.

  On one device these are the parts of `consecutive`.

  Args:
    tree: Of arrays whose rows lie over the devices.
    size: Rows of a part. Where the row shards do not divide it, parts are those
      of `consecutive`.
  """
  shards = _shards(size)

  def one(x):
    own = x.reshape(shards, -1, size // shards, *x.shape[1:])
    return _keep_parts(own.swapaxes(0, 1).reshape(-1, size, *x.shape[1:]))

  return jax.tree.map(one, tree)


def join(tree: Any) -> Any:
  """[parts, size, ...] -> [parts * size, ...]: `micro` undone."""

  def one(x):
    parts, size = x.shape[:2]
    shards = _shards(size)
    own = x.reshape(parts, shards, size // shards, *x.shape[2:])
    return meshes.constrain_rows(own.swapaxes(0, 1).reshape(-1, *x.shape[2:]))

  return jax.tree.map(one, tree)


def _shards(size: int) -> int:
  """Over how many devices the rows lie that make a part of `size`."""
  shards = meshes.row_shards(jax.sharding.get_abstract_mesh())
  return 1 if size % shards else shards


def _keep_parts(x: jax.Array) -> jax.Array:
  """`meshes.constrain_rows` of each part."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(None, *meshes.ROWS))
