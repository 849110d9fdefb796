"""Device meshes: from rules to shardings, from host arrays to global ones.

Axes: `data` copies the parameters, `fsdp` splits them and the rows, `tensor`
splits heads, hidden units and the vocabulary. All are `AxisType.Auto`: the
compiler places what the rules leave open. Over several slices `data` (and, if
asked, `fsdp`) is the outer axis: `mesh_shapes` says which sizes there are.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from actfocus_jax.parallel import mesh_shapes

AXES = mesh_shapes.AXES
ROWS = P(('data', 'fsdp'))

Rules = Sequence[tuple[str, P]]


def make_mesh(
  *,
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  dcn_data: int = -1,
  dcn_fsdp: int = 1,
  devices: Sequence[jax.Device] | None = None,
  splits: Sequence[mesh_shapes.Split] = (),
) -> Mesh:
  """Returns a mesh over all devices, or over `devices` if they are named.

  Args:
    data: size inside a slice; one of the first three may be -1: what the others
      leave of a slice.
    fsdp: see data.
    tensor: see data.
    dcn_data: size over slices, by which the axis `data` is longer; one of the
      two may be -1: what the other leaves of the slices.
    dcn_fsdp: the same for `fsdp`.
    devices: the devices to use; None takes every device of every process.
    splits: what the mesh must cut into equal parts.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices, or leave
      a split uneven; the sentence names the nearest sizes that fit.
  """
  devices = jax.devices() if devices is None else list(devices)
  wanted = dict(
    data=data, fsdp=fsdp, tensor=tensor, dcn_data=dcn_data, dcn_fsdp=dcn_fsdp
  )
  parts = slices(devices, _asked(dcn_data, dcn_fsdp))
  shape = mesh_shapes.choose(wanted, len(parts[0]), len(parts), splits)
  types = (AxisType.Auto,) * len(AXES)
  return Mesh(arrange(parts, shape), AXES, axis_types=types)


def slices(
  devices: Sequence[jax.Device], asked: int = 1
) -> list[list[jax.Device]]:
  """Returns the devices by what a fast network joins, in the order of slices.

  TPU devices know their slice. Where all lie in one, they are one slice, and so
  are devices of any other kind, whatever `slice_index` they have: GPUs may have
  one for each node. Unless more are asked for: then the processes, in their
  order, are dealt out to as many groups (one process a node, or one a device:
  either way neighbours share a group).

  Args:
    devices: the devices of the mesh.
    asked: how many slices the sizes `dcn_*` speak of, as far as they are fixed.

  Raises:
    ValueError: if the slices are unequal, or the processes do not make as many
      groups.
  """
  by_slice = _grouped(devices, _slice_index)
  if len(by_slice) == 1 and asked > 1:
    by_process = _grouped(devices, lambda d: d.process_index)
    count = len(by_process)
    if count % asked:
      raise ValueError(
        f'mesh.dcn_data * mesh.dcn_fsdp is {asked}, but all devices lie in one'
        f' slice, and the processes, {count}, do not make {asked} equal groups;'
        f' allowed: a divisor of {count}, or mesh.dcn_data=-1 with'
        ' mesh.dcn_fsdp=1.'
      )
    each = count // asked
    by_slice = [
      sum(by_process[i : i + each], []) for i in range(0, count, each)
    ]
  counts = [len(part) for part in by_slice]
  if len(set(counts)) > 1:
    raise ValueError(f'the slices have {counts} devices; they must be equal.')
  return by_slice


def _asked(dcn_data: int, dcn_fsdp: int) -> int:
  """How many slices these sizes speak of, as far as they are fixed."""
  return max(dcn_data, 1) * max(dcn_fsdp, 1)


def slice_count(mesh: Mesh, dcn_data: int = -1, dcn_fsdp: int = 1) -> int:
  """Returns how many slices a mesh of these sizes spans."""
  return len(slices(list(mesh.devices.flat), _asked(dcn_data, dcn_fsdp)))


def _slice_index(device: jax.Device) -> int:
  if device.platform != 'tpu':
    return 0
  return getattr(device, 'slice_index', None) or 0


def _grouped(devices, key) -> list[list[jax.Device]]:
  groups: dict[int, list[jax.Device]] = {}
  for device in devices:
    groups.setdefault(key(device), []).append(device)
  return [groups[index] for index in sorted(groups)]


def arrange(
  parts: Sequence[Sequence[jax.Device]], shape: mesh_shapes.Shape
) -> np.ndarray:
  """Returns the devices as an array with the axes of the mesh.

  Along an axis the devices of one slice are neighbours, as of
  `mesh_utils.create_hybrid_device_mesh`, which knows no groups of processes.
  """
  blocks = np.empty(len(parts), object)
  for i, part in enumerate(parts):
    # Sizes need not be products of the torus's own: 8 x 2 on 4 x 4.
    blocks[i] = mesh_utils.create_device_mesh(
      shape.inside, part, allow_split_physical_axes=True
    )
  return np.block(blocks.reshape(shape.outside).tolist())


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
  specs = match_rules(rules, abstract_params)
  splits = _splits(specs, abstract_params)
  # Data is left open: no rule splits a parameter over it.
  wanted = {**mesh.shape, 'data': -1, 'dcn_data': -1, 'dcn_fsdp': 1}
  for split in splits:
    if split.size % np.prod([mesh.shape[axis] for axis in split.axes]):
      count = slice_count(mesh)
      each = mesh.size // count
      shapes = mesh_shapes.nearest(wanted, each, count, splits)
      raise ValueError(
        f'{split.what} cannot be split over {" * ".join(split.axes)} of the'
        f' mesh {dict(mesh.shape)}: {split.size} of it are no multiple; nearest'
        f' that fit: {", or ".join(map(str, shapes))}.'
      )
  return shardings(mesh, specs)


def _splits(specs: Any, abstract_params: Any) -> list[mesh_shapes.Split]:
  """What the specs ask of each axis of each parameter."""

  def of(path: tuple[Any, ...], leaf: Any, spec: P):
    named = f'parameter {path_name(path)} of shape {leaf.shape}'
    for size, axes in zip(leaf.shape, spec, strict=False):
      if axes is not None:
        axes = axes if isinstance(axes, tuple) else (axes,)
        yield mesh_shapes.Split(named, size, axes)

  found = jax.tree_util.tree_map_with_path(
    lambda *leaf: list(of(*leaf)), abstract_params, specs
  )
  return jax.tree.leaves(found)


def rows(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose leading axis is the batch row."""
  return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, P())


def row_shards(mesh: Any) -> int:
  """Returns into how many parts `rows` splits a batch; 1 without a mesh."""
  return mesh.shape.get('data', 1) * mesh.shape.get('fsdp', 1)


def single_device_mesh() -> Mesh:
  """Returns a mesh of one device of this process, to make something small.

  What it makes is the same on whatever mesh the run has.
  """
  return make_mesh(devices=jax.local_devices()[:1])


def row_owners(mesh: Mesh) -> list[int]:
  """Returns the process of each row shard: that of its first device."""
  devices = mesh.devices.reshape(row_shards(mesh), -1)
  return [device.process_index for device in devices[:, 0]]


def constrain_rows(x: jax.Array) -> jax.Array:
  """Pins the leading axis of an activation to the rows of the ambient mesh.

  Without it the compiler answers FSDP weights by splitting the activations
  and summing them over the devices at each layer, instead of gathering the
  weight. Does nothing without an ambient mesh (`jax.set_mesh`).
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, ROWS)


def constrain_heads(x_BTJC: jax.Array) -> jax.Array:
  """Pins rows over the row shards and heads over `tensor`, if they divide.

  Heads that do not divide are whole on every device: else the compiler would
  keep parts of them apart, as their weights are, and rotate, and gather the
  cache, across devices. Does nothing without an ambient mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x_BTJC
  is_split = x_BTJC.shape[2] % mesh.shape['tensor'] == 0
  heads = 'tensor' if is_split else None
  return jax.lax.with_sharding_constraint(x_BTJC, P(*ROWS, None, heads))


def constrain_replicated(tree: Any) -> Any:
  """Pins arrays to be whole on every device; nothing without a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  return jax.lax.with_sharding_constraint(tree, P())


def put_rows(mesh: Mesh, tree: Any) -> Any:
  """Moves host arrays to the devices, split along their leading axis.

  Args:
    mesh: the mesh.
    tree: pytree of numpy arrays with the rows first. Every process passes all
      rows; each device takes its own.

  Raises:
    ValueError: if the rows do not divide over the mesh.
  """
  sharding, shards = rows(mesh), row_shards(mesh)

  def put(x: np.ndarray) -> jax.Array:
    if x.shape[0] % shards:
      raise ValueError(
        f'{x.shape[0]} rows do not divide over {shards} row shards of the'
        f' mesh {dict(mesh.shape)}.'
      )
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

  return jax.tree.map(put, tree)


@functools.cache
def _whole(mesh: Mesh) -> Any:
  return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def fetch(mesh: Mesh, tree: Any) -> Any:
  """Returns device arrays as numpy arrays, whole in every process."""
  return jax.device_get(_whole(mesh)(tree))


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
