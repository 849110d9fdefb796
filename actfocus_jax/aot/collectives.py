"""What chips send to each other in one collective of a compiled program."""

import dataclasses
import math
import re

import numpy as np

from actfocus_jax.aot import program_text

Instruction = program_text.Instruction
KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)


_BETWEEN_SLICES = r'_xla_megascale_transfer_type="(\w+)"'


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind over the same axes.

  Attributes:
    kind: E.g. 'all-gather'.
    axes: Mesh axes that it crosses, e.g. 'fsdp'.
    count: How often in one call of the program.
    ici: Bytes that a chip sends within its slice, in one call.
    dcn: Bytes that a chip sends to other slices, in one call.
    hops: From neighbour to neighbour, one after the other, in one call.
  """

  kind: str
  axes: str
  count: float
  ici: float
  dcn: float
  hops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the devices of a program lie, in the order of their numbers.

  Attributes:
    axes: Names and sizes of the mesh.
    slice_chips: Devices of one slice; slices follow each other.
    dimensions: In which the chips of a slice have neighbours.
  """

  axes: dict[str, int]
  slice_chips: int
  dimensions: int = 2

  @property
  def size(self) -> int:
    """All devices."""
    return math.prod(self.axes.values())

  def crossed(self, group: np.ndarray) -> str:
    """Names of the axes along which the members of a group differ."""
    where = np.unravel_index(group, tuple(self.axes.values()))
    names = [
      name
      for name, index in zip(self.axes, where, strict=True)
      if len(set(index.tolist())) > 1
    ]
    return ' x '.join(names) or 'none'

  def slices(self, group: np.ndarray) -> int:
    """How many slices a group spans."""
    return len(set((group // self.slice_chips).tolist()))

  def hops(self, count: int) -> float:
    """Least hops until `count` chips of a slice have heard of each other.

    They lie as closely as they can, and rings are taken to be closed, so that
    a message goes half way around each dimension.
    """
    return round(hops(count, self.dimensions), 6)


def hops(count: int, dimensions: int) -> float:
  """Half way around a ring, a square or a cube of chips, the least of them.

  Args:
    count: Chips that talk to each other.
    dimensions: The most that they can lie in.
  """
  if count < 2:
    return 0.0
  return min(d / 2 * count ** (1 / d) for d in range(1, dimensions + 1))


def kind_of(one: Instruction) -> str:
  """One of KINDS, or '' for what is no collective.

  Between slices the hosts carry out what a chip hands them by `send`.
  """
  if one.opcode == 'send':
    named = re.search(_BETWEEN_SLICES, one.attributes)
    return named.group(1).lower().replace('_', '-') if named else ''
  opcode = one.opcode.removesuffix('-start')
  return opcode if opcode in KINDS else ''


def wire(
  one: Instruction, layout: Layout
) -> tuple[str, str, float, float, float]:
  """(kind, axes, bytes within the slice, bytes to other slices, hops)."""
  kind = kind_of(one)
  sizes = [array.logical for array in one.arrays]
  if one.opcode.endswith('-start'):
    # (operands, results, ...): the larger of an all-gather is its result.
    sizes = sizes[:2]
    whole = max(sizes) if kind == 'all-gather' else sizes[-1]
  else:
    whole = sum(sizes)
  if one.opcode == 'send':
    return _between_slices(one, kind, layout)
  if kind == 'collective-permute':
    return _permuted(one, whole, layout)
  group = first_group(one.attributes, layout)
  n, slices = len(group), layout.slices(group)
  own = n // slices  # members in one slice
  whole = whole * n if kind == 'reduce-scatter' else whole
  passes = 2 if kind == 'all-reduce' else 1
  if n == 1:
    return kind, 'none', 0.0, 0.0, 0.0
  # Within the slice first, so that each chip sends its share of the sum on.
  ici = passes * whole * (own - 1) / own
  dcn = passes * whole / own * (slices - 1) / slices
  if kind in ('all-to-all', 'ragged-all-to-all'):
    ici, dcn = whole * (own - 1) / n, whole * (n - own) / n
  return kind, layout.crossed(group), ici, dcn, passes * layout.hops(own)


def _between_slices(one: Instruction, kind: str, layout: Layout):
  """What the host of a chip sends on; (data handed over, token, ...)."""
  whole = one.arrays[0].logical
  slices = layout.size // layout.slice_chips
  if kind == 'all-reduce':
    whole *= 2 * (slices - 1) / slices
  elif kind == 'all-gather':
    whole *= slices - 1
  elif kind in ('reduce-scatter', 'all-to-all'):
    whole *= (slices - 1) / slices
  return kind, 'slices', 0.0, whole, 0.0


def _permuted(one: Instruction, whole: float, layout: Layout):
  listed = re.search(r'source_target_pairs=\{(.*?)\}\}', one.attributes)
  pairs = re.findall(r'(\d+),(\d+)', listed.group(1)) if listed else []
  pairs = [np.array([int(a), int(b)]) for a, b in pairs if a != b]
  if not pairs:
    return 'collective-permute', 'none', 0.0, 0.0, 0.0
  crossing = any(layout.slices(pair) > 1 for pair in pairs)
  axes = layout.crossed(pairs[0])
  ici, dcn = (0.0, whole) if crossing else (whole, 0.0)
  return 'collective-permute', axes, ici, dcn, 0.0 if crossing else 1.0


def first_group(attributes: str, layout: Layout) -> np.ndarray:
  """The devices of the first replica group, in any of its three notations."""
  text = re.search(r'replica_groups=(.*)', attributes)
  everyone = np.arange(layout.size)
  if not text:
    return everyone
  text = text.group(1)
  iota = re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if iota:
    shape, dims, order = (
      [int(x) for x in part.split(',')] if part else None
      for part in iota.groups()
    )
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (
      ids.transpose(order).reshape(shape)[0] if order else ids.reshape(shape)[0]
    )
  named = re.match(r'mesh\[([^\]]*)\](?:[^{]*)\{([^}]*)\}', text)
  if named:
    return _mesh_group(*named.groups())
  listed = re.match(r'\{\{([\d,]*)\}', text)
  if listed and listed.group(1):
    return np.array([int(x) for x in listed.group(1).split(',')])
  return everyone


def _mesh_group(axes: str, chosen: str) -> np.ndarray:
  """A group of `mesh['a'=2,'b'=4] {'b'}`; `'b':(1)2` is a part of an axis."""
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
  ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
  index: list[np.ndarray] = [np.array([0])] * len(sizes)
  pattern = r"'(\w+)'(?::\((\d+)\)(\d+))?"
  for name, before, part in re.findall(pattern, chosen):
    axis, size = list(sizes).index(name), sizes[name]
    if part:
      stride = size // (int(before) * int(part))
      index[axis] = np.arange(int(part)) * stride
    else:
      index[axis] = np.arange(size)
  return ids[np.ix_(*index)].reshape(-1)
