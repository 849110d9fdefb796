"""What a compiled program moves: bytes of main memory, and between chips.

Loops are followed: what is in the body of a `while` counts as often as it runs.
A fusion reads its operands and writes its result; of an operand that it only
takes a slice of, the slice counts, and of a result that it updates in place,
the update. So a cache or a stack of layers is not counted whole where a row or
a layer of it is touched.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from actfocus_jax.aot import loops, program_text

Instruction = program_text.Instruction

# Nothing is moved by these.
_FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'after-all',
  'partition-id',
  'replica-id',
  'copy-done',
  'slice-done',
  'opt-barrier',
  'while',
  'call',
  'conditional',
  'iota',
  'domain',
}
_SLICES = {'slice', 'dynamic-slice', 'gather'}
_SAME = {'bitcast', 'reshape', 'get-tuple-element'}
KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind over the same axes.

  Attributes:
    kind: E.g. 'all-gather'.
    axes: Mesh axes that it crosses, e.g. 'fsdp'.
    count: How often in one call of the program.
    ici: Bytes that a chip sends within its slice, in one call.
    dcn: Bytes that a chip sends to other slices, in one call.
  """

  kind: str
  axes: str
  count: float
  ici: float
  dcn: float


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one call of a program moves, for each chip.

  Attributes:
    read_written: Bytes of main memory.
    copied: Of them, by copies alone: layouts that do not fit each other.
    cycles: The compiler's own estimate of computation and memory.
    collectives: By kind and axes.
    kernels: Names of the hand-written kernels in it, with their number.
  """

  read_written: float
  copied: float
  cycles: float
  collectives: tuple[Collective, ...]
  kernels: dict[str, float]

  @property
  def ici(self) -> float:
    """Bytes that a chip sends within its slice."""
    return sum(one.ici for one in self.collectives)

  @property
  def dcn(self) -> float:
    """Bytes that a chip sends to other slices."""
    return sum(one.dcn for one in self.collectives)


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the devices of a program lie, in the order of their numbers.

  Attributes:
    axes: Names and sizes of the mesh.
    slice_chips: Devices of one slice; slices follow each other.
  """

  axes: dict[str, int]
  slice_chips: int

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


def measure(
  text: program_text.Text, layout: Layout, *, trips: float = 1.0
) -> Traffic:
  """Adds up a program.

  Args:
    text: Of the compiled program.
    layout: Of its devices.
    trips: Of loops whose length only the data decide.

  Returns:
    What one call moves.
  """
  sums = {'bytes': 0.0, 'copied': 0.0, 'cycles': 0.0}
  wires: dict[tuple[str, str], tuple[float, Instruction]] = {}
  kernels: dict[str, float] = {}
  for where, one, times in _executed(text, text.entry, 1.0, trips):
    size = _moved(text, where, one)
    sums['bytes'] += times * size
    sums['cycles'] += times * one.cycles
    if one.opcode in ('copy', 'transpose'):
      sums['copied'] += times * size
    for kernel in _kernels(text, one):
      kernels[kernel] = kernels.get(kernel, 0.0) + times
    for inner in _collectives(text, one):
      key = _identity(where, inner)
      # A part of one in an inner loop goes on with what the outer one began.
      times_before = wires[key][0] if key in wires else math.inf
      wires[key] = min(times, times_before), inner
  found = _summed(wires.values(), layout)
  return Traffic(
    sums['bytes'],
    sums['copied'],
    sums['cycles'],
    found,
    kernels,
  )


def _identity(where: program_text.Computation, one: Instruction):
  """What is the same in all pieces of one collective.

  The compiler may spread one over several fusions, to overlap it with what
  they compute: those pieces share a channel.
  """
  channel = re.search(r'channel_id=(\d+)', one.attributes)
  if not channel:
    return where.name, one.name
  is_spread = 'async_collective_fusion_config' in one.attributes
  return '' if is_spread else where.name, channel.group(1)


def _summed(wires, layout: Layout) -> tuple[Collective, ...]:
  found: dict[tuple[str, str], np.ndarray] = {}
  for times, one in wires:
    kind, axes, ici, dcn = _wire(one, layout)
    added = times * np.array([1.0, ici, dcn])
    found[kind, axes] = found.get((kind, axes), 0.0) + added
  return tuple(
    Collective(*key, *map(float, sums)) for key, sums in sorted(found.items())
  )


def _executed(
  text: program_text.Text, name: str, times: float, trips: float
) -> Iterator[tuple[program_text.Computation, Instruction, float]]:
  """Every instruction that is executed on its own, and how often."""
  where = text.computations[name]
  for one in where.instructions:
    if one.opcode == 'while':
      known = loops.trips(text, where, one)
      repeated = times * (trips if known is None else known)
      body = program_text.body_of(one)
      yield from _executed(text, body, repeated, trips)
      condition = program_text.condition_of(one)
      yield from _executed(text, condition, repeated, trips)
    elif one.opcode in ('call', 'call-start', 'async-start'):
      for inner in one.called:
        yield from _executed(text, inner, times, trips)
    elif one.opcode == 'conditional':
      # The branches are not told apart: the last is the one that does work.
      for inner in _branches(one)[-1:]:
        yield from _executed(text, inner, times, trips)
    else:
      yield where, one, times


def _branches(one: Instruction) -> list[str]:
  listed = re.search(r'branch_computations=\{([^}]*)\}', one.attributes)
  if listed:
    return [name.strip().lstrip('%') for name in listed.group(1).split(',')]
  return re.findall(r'(?:true|false)_computation=%?([\w.\-]+)', one.attributes)


# --- Main memory -------------------------------------------------------------


def _moved(
  text: program_text.Text,
  where: program_text.Computation,
  one: Instruction,
) -> float:
  if one.opcode in _FREE or one.opcode.endswith('-done'):
    return 0.0
  if one.opcode in ('copy-start', 'slice-start'):
    # (from, to, context) of both only what lies in main memory.
    target = one.arrays[0] if one.opcode == 'copy-start' else one.arrays[1]
    source = one.arrays[1] if one.opcode == 'copy-start' else target
    moved = min(target.logical, source.logical)
    ends = (one.arrays[0].size > 0) + (one.arrays[1].size > 0)
    return moved * ends
  read = sum(
    _read(text, where, one, operand, i)
    for i, operand in enumerate(one.operands)
  )
  written = _written(text, where, one)
  if one.opcode.endswith('-start'):
    # What is under way names its operands beside its results.
    given = (where.by_name.get(operand) for operand in one.operands)
    written -= sum(source.size for source in given if source)
  return read + max(written, 0.0)


def _read(text, where, one: Instruction, operand: str, index: int) -> float:
  """Bytes that an instruction reads of one operand."""
  source = where.by_name.get(operand)
  if source is None:
    return 0.0
  whole = source.size
  if not whole:
    return 0.0
  if one.opcode in _SLICES and index == 0:
    return min(whole, _logical(one))
  if one.opcode in ('dynamic-update-slice', 'scatter') and index == 0:
    return 0.0
  if one.opcode == 'fusion':
    inner = text.computations[one.called[0]]
    parameter = inner.parameters.get(index)
    if parameter is None:
      return whole
    return min(whole, _read_inside(text, inner, parameter))
  return whole


def _read_inside(text, inner, value: Instruction) -> float:
  """Bytes of a fused operand that somebody in the fusion looks at."""
  total = 0.0
  for user in inner.users.get(value.name, []):
    for index, operand in enumerate(user.operands):
      if operand != value.name:
        continue
      if user.opcode in _SAME:
        total += _read_inside(text, inner, user)
      elif user.opcode in _SLICES and index == 0:
        total += _logical(user)
      elif user.opcode in ('dynamic-update-slice', 'scatter') and index == 0:
        total += 0.0
      elif user.opcode == 'fusion':
        deeper = text.computations[user.called[0]]
        total += _read_inside(text, deeper, deeper.parameters[index])
      else:
        return math.inf
  return total


def _written(text, where, one: Instruction) -> float:
  """Bytes that an instruction writes to main memory."""
  if not one.size:
    return 0.0
  if one.opcode == 'dynamic-update-slice':
    return _logical(where.by_name[one.operands[1]])
  if one.opcode == 'scatter':
    return _logical(where.by_name[one.operands[-1]])
  if one.opcode == 'fusion':
    inner = text.computations[one.called[0]]
    return min(one.size, _written_by(text, inner, inner.root))
  return one.size


def _written_by(text, inner, root: Instruction) -> float:
  if root.opcode == 'tuple':
    return sum(
      _written_by(text, inner, inner.by_name[name]) for name in root.operands
    )
  if root.opcode in _SAME and root.operands:
    return _written_by(text, inner, inner.by_name[root.operands[0]])
  if root.opcode == 'dynamic-update-slice':
    return _logical(inner.by_name[root.operands[1]])
  if root.opcode == 'scatter':
    return _logical(inner.by_name[root.operands[-1]])
  if root.opcode == 'fusion':
    deeper = text.computations[root.called[0]]
    return _written_by(text, deeper, deeper.root)
  return sum(max(x.size, x.logical) for x in root.arrays)


def _logical(one: Instruction) -> float:
  return sum(max(array.size, array.logical) for array in one.arrays)


# --- Between chips -----------------------------------------------------------


def _kernels(text, one: Instruction) -> list[str]:
  """Names of the kernels that an instruction calls."""
  if one.opcode != 'custom-call' or 'tpu_custom_call' not in one.attributes:
    return []
  return [re.sub(r'[.\d]*$', '', one.name)]


def _collectives(text, one: Instruction) -> Iterator[Instruction]:
  """The collective that an instruction is, or those that are fused in it."""
  if _kind(one):
    yield one
  elif one.opcode == 'fusion':
    for name in one.called:
      for inner in text.computations[name].instructions:
        yield from _collectives(text, inner)


def _kind(one: Instruction) -> str:
  opcode = one.opcode.removesuffix('-start')
  return opcode if opcode in KINDS else ''


def _wire(one: Instruction, layout: Layout) -> tuple[str, str, float, float]:
  """(kind, axes, bytes within the slice, bytes to other slices) of a chip."""
  kind = _kind(one)
  sizes = [array.logical for array in one.arrays]
  if one.opcode.endswith('-start'):
    # (operands, results, ...): the larger of an all-gather is its result.
    sizes = sizes[:2]
    whole = max(sizes) if kind == 'all-gather' else sizes[-1]
  else:
    whole = sum(sizes)
  if kind == 'collective-permute':
    return _permuted(one, whole, layout)
  group = first_group(one.attributes, layout)
  n, slices = len(group), layout.slices(group)
  own = n // slices  # members in one slice
  whole = whole * n if kind == 'reduce-scatter' else whole
  passes = 2 if kind == 'all-reduce' else 1
  if n == 1:
    return kind, 'none', 0.0, 0.0
  # Within the slice first, so that each chip sends its share of the sum on.
  ici = passes * whole * (own - 1) / own
  dcn = passes * whole / own * (slices - 1) / slices
  if kind in ('all-to-all', 'ragged-all-to-all'):
    ici, dcn = whole * (own - 1) / n, whole * (n - own) / n
  return kind, layout.crossed(group), ici, dcn


def _permuted(one: Instruction, whole: float, layout: Layout):
  listed = re.search(r'source_target_pairs=\{(.*?)\}\}', one.attributes)
  pairs = re.findall(r'(\d+),(\d+)', listed.group(1)) if listed else []
  pairs = [np.array([int(a), int(b)]) for a, b in pairs if a != b]
  if not pairs:
    return 'collective-permute', 'none', 0.0, 0.0
  crossing = any(layout.slices(pair) > 1 for pair in pairs)
  axes = layout.crossed(pairs[0])
  ici, dcn = (0.0, whole) if crossing else (whole, 0.0)
  return 'collective-permute', axes, ici, dcn


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
