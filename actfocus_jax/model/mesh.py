"""Device meshes: from rules to shardings, from host arrays to global ones.

Axes: `data` copies the parameters, `fsdp` splits them and the rows, `tensor`
splits heads, hidden units and the vocabulary. All are `AxisType.Auto`: the
compiler places what the rules leave open.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp', 'tensor')
ROWS = P(('data', 'fsdp'))

Rules = Sequence[tuple[str, P]]


def make_mesh(
  *,
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Returns a mesh over all devices, or over `devices` if they are named.

  Args:
    data: size of the axis; one of the three may be -1: what the others leave.
    fsdp: see data.
    tensor: see data.
    devices: the devices to use; None takes every device of every process.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = {'data': data, 'fsdp': fsdp, 'tensor': tensor}
  open_axes = [axis for axis, size in sizes.items() if size == -1]
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if open_axes and fixed > 0 and len(devices) % fixed == 0:
    sizes[open_axes[0]] = len(devices) // fixed
  shape = tuple(sizes.values())
  if min(shape) < 1 or np.prod(shape) != len(devices):
    raise ValueError(
      f'mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit'
      f' {len(devices)} devices: the sizes must be positive and multiply to'
      ' that number, and at most one may be -1 (what the others leave).'
    )
  return jax.make_mesh(
    shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
  )


def path_name(path: tuple[Any, ...]) -> str:
  """Returns a pytree path as words and slashes: `layers/q/kernel`."""
  words = [jax.tree_util.keystr((key,), simple=True) for key in path]
  # The last step into an nnx.Param is an attribute of its own; not a name.
  if words and isinstance(path[-1], jax.tree_util.GetAttrKey):
    words = words[:-1] if words[-1] == 'value' else words
  return '/'.join(words)


def match_rules(rules: Rules, abstract_params: Any) -> Any:
  """Returns a pytree of PartitionSpecs: the first rule that matches wins.

  Args:
    rules: (regular expression, spec) pairs, searched in the parameter's path,
      such as `layers/q/kernel`.
    abstract_params: pytree whose leaves have a shape. Scalars need no rule.

  Raises:
    ValueError: if a parameter has no rule, or one with more axes than it has.
  """

  def spec(path: tuple[Any, ...], leaf: Any) -> P:
    name = path_name(path)
    if not leaf.shape:
      return P()
    found = next((s for regex, s in rules if re.search(regex, name)), None)
    if found is None or len(found) > len(leaf.shape):
      reason = 'no rule' if found is None else f'the rule {found}, too long,'
      raise ValueError(
        f'parameter {name} of shape {leaf.shape} has {reason} in the partition'
        ' rules; every parameter needs one that fits.'
      )
    return found

  return jax.tree_util.tree_map_with_path(spec, abstract_params)


def shardings(mesh: Mesh, specs: Any) -> Any:
  """Returns the pytree of NamedShardings of a pytree of PartitionSpecs."""
  return jax.tree.map(
    functools.partial(NamedSharding, mesh),
    specs,
    is_leaf=lambda leaf: isinstance(leaf, P),
  )


def param_shardings(mesh: Mesh, rules: Rules, abstract_params: Any) -> Any:
  """Returns the NamedSharding of every parameter, checked against its shape.

  Raises:
    ValueError: if a parameter has no rule, or if its rule splits an axis that
      the mesh does not divide.
  """

  def check(path: tuple[Any, ...], leaf: Any, sharding: NamedSharding) -> Any:
    try:
      sharding.shard_shape(leaf.shape)
    except ValueError as error:
      raise ValueError(
        f'parameter {path_name(path)} of shape {leaf.shape} cannot be split as'
        f' {sharding.spec} over the mesh {dict(mesh.shape)}: choose fsdp and'
        ' tensor sizes that divide it.'
      ) from error
    return sharding

  named = shardings(mesh, match_rules(rules, abstract_params))
  return jax.tree_util.tree_map_with_path(check, abstract_params, named)


def rows(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose leading axis is the batch row."""
  return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, P())


def row_shards(mesh: Any) -> int:
  """Returns into how many parts `rows` splits a batch; 1 without a mesh."""
  return mesh.shape.get('data', 1) * mesh.shape.get('fsdp', 1)


def keep_rows(x: jax.Array) -> jax.Array:
  """Pins the leading axis of an activation to the rows of the ambient mesh.

  Without it the compiler answers FSDP weights by splitting the activations
  and summing them over the devices at each layer, instead of gathering the
  weight. Does nothing without an ambient mesh (`jax.set_mesh`).
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, ROWS)


def put_rows(mesh: Mesh, tree: Any) -> Any:
  """Moves host arrays to the devices, split along their leading axis.

  Args:
    mesh: the mesh.
    tree: pytree of numpy arrays with the rows first. With several processes
      each passes its own rows, in the order of its devices in the mesh.

  Raises:
    ValueError: if the rows do not divide over the mesh.
  """
  sharding = rows(mesh)
  local_shards = max(1, row_shards(mesh) // jax.process_count())

  def put(x: np.ndarray) -> jax.Array:
    if x.shape[0] % local_shards:
      raise ValueError(
        f'{x.shape[0]} rows do not divide over {local_shards} row shards of the'
        f' mesh {dict(mesh.shape)}.'
      )
    return jax.make_array_from_process_local_data(sharding, np.asarray(x))

  return jax.tree.map(put, tree)


@functools.lru_cache(maxsize=16)
def recast(dtype: Any, out_shardings: tuple[NamedSharding, ...]) -> Any:
  """Returns the compiled copy; kept, so that each iteration reuses it."""
  return jax.jit(
    lambda leaves: tuple(x.astype(dtype) for x in leaves),
    out_shardings=out_shardings,
  )


def decode_layout(params: Any, mesh: Mesh, dtype: Any) -> Any:
  """Returns a copy of the parameters for decoding: cast, the fsdp axis dropped.

  Decoding reads every weight once per token; gathering them over `fsdp` once
  per iteration instead of once per token is what this copy buys. `tensor`
  stays. The copy shares no buffer with `params`.

  Args:
    params: pytree of arrays with NamedShardings.
    mesh: the mesh they live on.
    dtype: dtype of the copy.
  """
  leaves, treedef = jax.tree.flatten(params)
  layout = tuple(jax.tree.leaves(decode_shardings(params, mesh)))
  copied = recast(jax.numpy.dtype(dtype), layout)(tuple(leaves))
  return jax.tree.unflatten(treedef, copied)


def decode_shardings(params: Any, mesh: Mesh) -> Any:
  """Returns where `decode_layout` puts each parameter."""

  def spec(sharding: NamedSharding) -> P:
    return P(*(None if axis == 'fsdp' else axis for axis in sharding.spec))

  return jax.tree.map(lambda x: NamedSharding(mesh, spec(x.sharding)), params)
