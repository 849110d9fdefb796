"""Device meshes: from rules to shardings, from host arrays to global ones.

Axes: `data` copies the parameters, `fsdp` splits them and the rows, `tensor`
splits heads, hidden units and the vocabulary. All are `AxisType.Auto`: the
compiler places what the rules leave open. Over several slices `data` (or `fsdp`
if configured) is the outer axis; `mesh_shapes` defines the sizes.
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
  """Return a mesh over all devices, or over the given ones.

  Args:
    data: size inside a slice; at most one of data, fsdp and tensor may be -1,
      the rest of a slice.
    fsdp: size inside a slice.
    tensor: size inside a slice.
    dcn_data: size over slices, a factor of the axis `data`; one of the two may
      be -1, the rest of the slices.
    dcn_fsdp: size over slices, a factor of the axis `fsdp`.
    devices: devices of the mesh; None takes every device of every process.
    splits: sizes that the mesh must cut into equal parts.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or leave a
      split uneven; the sentence names the nearest sizes that fit.
  """
  devices = jax.devices() if devices is None else list(devices)
  wanted = dict(
    data=data, fsdp=fsdp, tensor=tensor, dcn_data=dcn_data, dcn_fsdp=dcn_fsdp
  )
  parts = slices(devices, _fixed_slices(dcn_data, dcn_fsdp))
  shape = mesh_shapes.choose(wanted, len(parts[0]), len(parts), splits)
  types = (AxisType.Auto,) * len(AXES)
  return Mesh(arrange(parts, shape), AXES, axis_types=types)


def slices(
  devices: Sequence[jax.Device], wanted: int = 1
) -> list[list[jax.Device]]:
  """Return the devices grouped by slice, the part that a fast network joins.

  TPU devices know their slice. Devices of any other kind are one slice,
  whatever their `slice_index`: GPUs may have one per node. If there is one
  slice and more are wanted, consecutive processes form that many groups, with
  one process per node or per device.

  Raises:
    ValueError: the slices are unequal, or the processes do not form that many
      groups.
  """
  by_slice = _grouped(devices, _slice_index)
  if len(by_slice) == 1 and wanted > 1:
    by_process = _grouped(devices, lambda d: d.process_index)
    count = len(by_process)
    if count % wanted:
      raise ValueError(
        f'mesh.dcn_data * mesh.dcn_fsdp is {wanted}, but all devices lie in one'
        f' slice, and {count} processes do not form {wanted} equal groups;'
        f' allowed: a divisor of {count}, or mesh.dcn_data=-1 with'
        ' mesh.dcn_fsdp=1.'
      )
    each = count // wanted
    by_slice = [
      sum(by_process[i : i + each], []) for i in range(0, count, each)
    ]
  counts = [len(part) for part in by_slice]
  if len(set(counts)) > 1:
    raise ValueError(f'the slices have {counts} devices; they must be equal.')
  return by_slice


def _fixed_slices(dcn_data: int, dcn_fsdp: int) -> int:
  """Number of slices that these sizes need; an open size counts as 1."""
  return max(dcn_data, 1) * max(dcn_fsdp, 1)


def slice_count(mesh: Mesh, dcn_data: int = -1, dcn_fsdp: int = 1) -> int:
  """Return the number of slices that a mesh of these sizes spans."""
  wanted = _fixed_slices(dcn_data, dcn_fsdp)
  return len(slices(list(mesh.devices.flat), wanted))


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
  """Return the devices of each slice as neighbours along the mesh axes.

  `mesh_utils.create_hybrid_device_mesh` does the same for TPU slices only.
  """
  blocks = np.empty(len(parts), object)
  for i, part in enumerate(parts):
    # Sizes may differ from those of the torus: 8 x 2 on 4 x 4.
    blocks[i] = mesh_utils.create_device_mesh(
      shape.inside, part, allow_split_physical_axes=True
    )
  return np.block(blocks.reshape(shape.outside).tolist())


def path_name(path: tuple[Any, ...]) -> str:
  """Return a pytree path as words and slashes: `layers/q/kernel`."""
  words = [jax.tree_util.keystr((key,), simple=True) for key in path]
  # The last step into an nnx.Param is its attribute `value`, not a name.
  if words and isinstance(path[-1], jax.tree_util.GetAttrKey):
    words = words[:-1] if words[-1] == 'value' else words
  return '/'.join(words)


def match_rules(rules: Rules, abstract_params: Any) -> Any:
  """Return a pytree of PartitionSpecs: the first rule that matches wins.

  The regular expression of a rule is searched in the parameter's path, such as
  `layers/q/kernel`. Scalars need no rule.

  Raises:
    ValueError: a parameter has no rule, or one with more axes than it has.
  """

  def spec(path: tuple[Any, ...], leaf: Any) -> P:
    name = path_name(path)
    if not leaf.shape:
      return P()
    rule = next((s for regex, s in rules if re.search(regex, name)), None)
    if rule is None or len(rule) > len(leaf.shape):
      fault = 'no rule' if rule is None else f'the rule {rule}, too long,'
      raise ValueError(
        f'parameter {name} of shape {leaf.shape} has {fault} in the partition'
        ' rules; every parameter needs one that fits.'
      )
    return rule

  return jax.tree_util.tree_map_with_path(spec, abstract_params)


def param_shardings(mesh: Mesh, rules: Rules, abstract_params: Any) -> Any:
  """Return the NamedSharding of every parameter, checked against its shape.

  Raises:
    ValueError: a parameter has no rule, or its rule splits an axis that the
      mesh does not divide.
  """
  specs = match_rules(rules, abstract_params)
  splits = _splits(specs, abstract_params)
  # Data stays open: no rule splits a parameter over it.
  wanted = {**mesh.shape, 'data': -1, 'dcn_data': -1, 'dcn_fsdp': 1}
  for split in splits:
    if split.size % np.prod([mesh.shape[axis] for axis in split.axes]):
      count = slice_count(mesh)
      each = mesh.size // count
      shapes = mesh_shapes.nearest(wanted, each, count, splits)
      raise ValueError(
        f'{split.what} cannot be split over {" * ".join(split.axes)} of the'
        f' mesh {dict(mesh.shape)}: {split.size} is not a multiple; nearest'
        f' that fit: {", or ".join(map(str, shapes))}.'
      )
  return jax.tree.map(
    functools.partial(NamedSharding, mesh),
    specs,
    is_leaf=lambda leaf: isinstance(leaf, P),
  )


def _splits(specs: Any, abstract_params: Any) -> list[mesh_shapes.Split]:
  """Return the splits of each axis of each parameter."""

  def splits_of(path: tuple[Any, ...], leaf: Any, spec: P):
    name = f'parameter {path_name(path)} of shape {leaf.shape}'
    return [
      mesh_shapes.Split(
        name, size, axes if isinstance(axes, tuple) else (axes,)
      )
      for size, axes in zip(leaf.shape, spec, strict=False)
      if axes is not None
    ]

  return jax.tree.leaves(
    jax.tree_util.tree_map_with_path(splits_of, abstract_params, specs)
  )


def rows(mesh: Mesh) -> NamedSharding:
  """Return the sharding of arrays whose leading axis is the batch row."""
  return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, P())


def row_shards(mesh: Any) -> int:
  """Return the number of parts of a batch under `rows`; 1 without a mesh."""
  return mesh.shape.get('data', 1) * mesh.shape.get('fsdp', 1)


def single_device_mesh() -> Mesh:
  """Return a mesh of one device of this process.

  What is computed on it does not depend on the mesh of the run.
  """
  return make_mesh(devices=jax.local_devices()[:1])


def row_owners(mesh: Mesh) -> list[int]:
  """Return the process of each row shard: that of its first device."""
  devices = mesh.devices.reshape(row_shards(mesh), -1)
  return [device.process_index for device in devices[:, 0]]


def constrain_rows(x: jax.Array) -> jax.Array:
  """Constrain the leading axis of an activation to rows of the ambient mesh.

  Without it the compiler splits the activations of FSDP weights and sums them
  over the devices in each layer, instead of gathering the weight. Does nothing
  without an ambient mesh (`jax.set_mesh`).
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, ROWS)


def constrain_heads(x_BTJC: jax.Array) -> jax.Array:
  """Constrain rows to row shards and heads to `tensor`, if they divide.

  Heads that do not divide are whole on every device. Otherwise the compiler
  would split single heads like their weights, and would rotate them and gather
  the cache across devices. Does nothing without an ambient mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x_BTJC
  is_split = x_BTJC.shape[2] % mesh.shape['tensor'] == 0
  heads = 'tensor' if is_split else None
  return jax.lax.with_sharding_constraint(x_BTJC, P(*ROWS, None, heads))


def constrain_replicated(tree: Any) -> Any:
  """Constrain arrays to be whole on every device; nothing without a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  return jax.lax.with_sharding_constraint(tree, P())


def put_rows(mesh: Mesh, tree: Any) -> Any:
  """Move host arrays to the devices, split along their leading axis.

  Every process passes all rows; each device takes its own.

  Raises:
    ValueError: the rows do not divide over the mesh.
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
def _replicate(mesh: Mesh) -> Any:
  return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def fetch(mesh: Mesh, tree: Any) -> Any:
  """Return device arrays as numpy arrays, whole in every process."""
  return jax.device_get(_replicate(mesh)(tree))


@functools.lru_cache(maxsize=16)
def recast(dtype: Any, out_shardings: tuple[NamedSharding, ...]) -> Any:
  """Return the jitted cast and copy; cached for the next iteration."""
  return jax.jit(
    lambda leaves: tuple(x.astype(dtype) for x in leaves),
    out_shardings=out_shardings,
  )


def decode_layout(params: Any, mesh: Mesh, dtype: Any) -> Any:
  """Return a copy of the parameters for decoding: cast, without the fsdp axis.

  Decoding reads every weight once per token. With this copy the weights are
  gathered over `fsdp` once per iteration instead of once per token. `tensor`
  stays. The copy shares no buffer with `params`.
  """
  leaves, treedef = jax.tree.flatten(params)
  layout = tuple(jax.tree.leaves(decode_shardings(params, mesh)))
  copied = recast(jax.numpy.dtype(dtype), layout)(tuple(leaves))
  return jax.tree.unflatten(treedef, copied)


def decode_shardings(params: Any, mesh: Mesh) -> Any:
  """Return the sharding of each parameter in its decode layout."""

  def spec(sharding: NamedSharding) -> P:
    return P(*(None if axis == 'fsdp' else axis for axis in sharding.spec))

  return jax.tree.map(lambda x: NamedSharding(mesh, spec(x.sharding)), params)
