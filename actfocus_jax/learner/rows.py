"""Batches cut into parts along their rows, each part over all devices."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

_ROWS = ('data', 'fsdp')


def split(tree: Any, size: int) -> Any:
  """[B, ...] -> [B / size, size, ...], each part spread over the devices."""

  def one(x):
    parts = x.reshape(-1, size, *x.shape[1:])
    if jax.sharding.get_abstract_mesh().empty:
      return parts
    return jax.lax.with_sharding_constraint(parts, P(None, _ROWS))

  return jax.tree.map(one, tree)


def join(tree: Any) -> Any:
  """[parts, size, T] -> [parts * size, T]: `split` undone."""
  return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), tree)
