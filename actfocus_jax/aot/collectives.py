"""What chips send to each other in one collective of a compiled program."""

import dataclasses
import math
import re

import jax
import numpy as np

from actfocus_jax.aot import links, program_text, topology

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
    load: Bytes that all links of a chip would carry in the time that those take
      which the group can use: `ici`, or more.
    dcn: Bytes that a chip sends to other slices, in one call.
    hops: From neighbour to neighbour, one after the other, in one call.
  """

  kind: str
  axes: str
  count: float
  ici: float
  load: float
  dcn: float
  hops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the devices of a program lie, in the order of their numbers.

  Attributes:
    axes: Names and sizes of the mesh.
    inside: Those of the part of it that is one slice; slices follow each other.
    torus: In which the chips of a slice lie.
    places: Where each of them does; without it row by row.
  """

  axes: dict[str, int]
  inside: dict[str, int]
  torus: links.Torus
  places: np.ndarray | None = None

  @classmethod
  def of(cls, mesh: jax.sharding.Mesh, where: topology.Topology) -> 'Layout':
    """As the devices of a mesh say; row by row if they do not."""
    devices = mesh.devices.reshape(-1)
    first = min(map(topology.slice_of, devices))
    own = [i for i, x in enumerate(devices) if topology.slice_of(x) == first]
    inside = {
      name: len(set(index.tolist()))
      for name, index in zip(
        mesh.axis_names, np.unravel_index(own, mesh.devices.shape), strict=True
      )
    }
    if not hasattr(devices[0], 'coords'):
      return cls(dict(mesh.shape), inside, links.Torus(where.sizes))
    places = np.array([devices[i].coords[: len(where.sizes)] for i in own])
    sizes = tuple((places.max(axis=0) + 1).tolist())
    return cls(dict(mesh.shape), inside, links.Torus(sizes), places)

  @property
  def size(self) -> int:
    """All devices."""
    return math.prod(self.axes.values())

  @property
  def slice_chips(self) -> int:
    """Devices of one slice."""
    return math.prod(self.inside.values())

  def among(self, count: int) -> 'Layout':
    """The layout that the numbers of a program mean, by how many they are.

    A program for several slices numbers the devices of one of them: what goes
    between slices is in no group, but in what is sent to the hosts.
    """
    if count != self.slice_chips:
      return self
    return dataclasses.replace(self, axes=self.inside)

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

  def span(self, group: np.ndarray) -> links.Span:
    """What joins the members of a group that are in the slice of the first."""
    own = group[group // self.slice_chips == group[0] // self.slice_chips]
    own = own % self.slice_chips
    if self.places is not None:
      return self.torus.span(self.places[own])
    rows = np.unravel_index(own, self.torus.sizes)
    return self.torus.span(np.stack(rows, axis=1))


def kind_of(one: Instruction) -> str:
  """One of KINDS, or '' for what is no collective.

  Between slices the hosts carry out what a chip hands them by `send`.
  """
  if one.opcode == 'send':
    named = re.search(_BETWEEN_SLICES, one.attributes)
    return named.group(1).lower().replace('_', '-') if named else ''
  opcode = one.opcode.removesuffix('-start')
  return opcode if opcode in KINDS else ''


def wire(one: Instruction, layout: Layout, *, ways: int = 1) -> Collective:
  """What one call of an instruction sends.

  Args:
    one: A collective.
    layout: Of the devices.
    ways: Of a permutation: 2 if another one goes the opposite way meanwhile.

  Returns:
    Its bytes; of two that share the time, each has half of load and hops.
  """
  kind = kind_of(one)
  if one.opcode == 'send':
    return _between_slices(one, kind, layout)
  whole = _results(one)
  if kind == 'collective-permute':
    return _permuted(one, whole, layout, ways)
  group, count = first_group(one.attributes, layout)
  layout = layout.among(count)
  n, slices = len(group), layout.slices(group)
  own = n // slices  # members in one slice
  whole = whole * n if kind == 'reduce-scatter' else whole
  passes = 2 if kind == 'all-reduce' else 1
  if n == 1:
    return Collective(kind, 'none', 1.0, 0.0, 0.0, 0.0)
  # Within the slice first, so that each chip sends its share of the sum on.
  ici = passes * whole * (own - 1) / own
  dcn = passes * whole / own * (slices - 1) / slices
  if kind in ('all-to-all', 'ragged-all-to-all'):
    ici, dcn = whole * (own - 1) / n, whole * (n - own) / n
  share, hops = layout.span(group)
  axes = layout.crossed(group)
  return Collective(kind, axes, 1.0, ici, ici / share, dcn, passes * hops)


def _results(one: Instruction) -> float:
  """Bytes of what a collective makes.

  One that goes on meanwhile names its operands before its results, except for
  sums, whose results are as large.

  Raises:
    ValueError: If its shape is none of these.
  """
  sizes = [array.logical for array in one.arrays]
  count = len(one.operands)
  if one.opcode.endswith('-start') and len(sizes) >= 2 * count:
    return sum(sizes[count : 2 * count])
  if len(sizes) == count:
    return sum(sizes)
  raise ValueError(
    f'{one.name}, {one.opcode} of {count} operands, has {len(sizes)} results.'
  )


def _between_slices(one: Instruction, kind: str, layout: Layout) -> Collective:
  """What the host of a chip sends on; (data handed over, token, ...)."""
  whole = one.arrays[0].logical
  slices = layout.size // layout.slice_chips
  if kind == 'all-reduce':
    whole *= 2 * (slices - 1) / slices
  elif kind == 'all-gather':
    whole *= slices - 1
  elif kind in ('reduce-scatter', 'all-to-all'):
    whole *= (slices - 1) / slices
  return Collective(kind, 'slices', 1.0, 0.0, 0.0, whole)


def pairs(one: Instruction) -> frozenset[tuple[int, int]]:
  """(from, to) of a permutation that somebody is sent; else nothing."""
  listed = re.search(r'source_target_pairs=\{(.*?)\}\}', one.attributes)
  named = re.findall(r'(\d+),(\d+)', listed.group(1)) if listed else []
  return frozenset((int(a), int(b)) for a, b in named if a != b)


def _permuted(
  one: Instruction, whole: float, layout: Layout, ways: int
) -> Collective:
  kind, sent = 'collective-permute', np.array(sorted(pairs(one)))
  if not sent.size:
    return Collective(kind, 'none', 1.0, 0.0, 0.0, 0.0)
  if sent.max() < layout.slice_chips:
    layout = layout.among(layout.slice_chips)
  axes = layout.crossed(sent[0])
  if any(layout.slices(pair) > 1 for pair in sent):
    return Collective(kind, axes, 1.0, 0.0, 0.0, whole)
  # To one neighbour, over one link.
  load = whole * 2 * len(layout.torus.sizes) / ways
  hops = max(layout.span(pair).hops for pair in sent) / ways
  return Collective(kind, axes, 1.0, whole, load, 0.0, hops)


def first_group(attributes: str, layout: Layout) -> tuple[np.ndarray, int]:
  """The devices of the first replica group, and how many all groups have.

  Args:
    attributes: Of the collective; groups have four notations.
    layout: Of the devices, all of which are meant where no group is named.

  Returns:
    The members' numbers, and the size of all groups together.
  """
  text = re.search(r'replica_groups=(.*)', attributes)
  text = text.group(1) if text else ''
  iota = re.match(r'\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', text)
  if iota:
    ids = _iota(iota.group(2))
    return ids.reshape(_numbers(iota.group(1)))[0], ids.size
  named = re.match(
    r'mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{(.*?)\}', text
  )
  if named:
    return _mesh_group(*named.groups())
  listed = re.match(r'\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}', text)
  if listed:
    groups = [_numbers(one) for one in listed.group(1)[1:-1].split('},{')]
    return np.array(groups[0]), sum(map(len, groups))
  return np.arange(layout.size), layout.size


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(',')]


def _iota(text: str) -> np.ndarray:
  """The numbers that `[4,2]T(1,0)` means: counted, then transposed."""
  dims, order = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups()
  ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
  return ids.transpose(_numbers(order)) if order else ids


def _mesh_group(axes: str, ids_text: str | None, chosen: str):
  """A group of `mesh['a'=2,'b'=4] {'b'}`; `'b':(1)2` is a part of an axis."""
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
  count = math.prod(sizes.values())
  ids = _iota(ids_text or f'[{count}]').reshape(tuple(sizes.values()))
  index: list[np.ndarray] = [np.array([0])] * len(sizes)
  pattern = r"'(\w+)'(?::\((\d+)\)(\d+))?"
  for name, before, part in re.findall(pattern, chosen):
    axis, size = list(sizes).index(name), sizes[name]
    if part:
      stride = size // (int(before) * int(part))
      index[axis] = np.arange(int(part)) * stride
    else:
      index[axis] = np.arange(size)
  return ids[np.ix_(*index)].reshape(-1), count
