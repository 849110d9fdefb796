"""Read the text of a compiled program: loops, bytes of memory, collectives.

XLA's own cost analysis counts the body of a loop once. Layers, micro-batches
and decoding steps are loops, so the text is walked here and each body counts as
often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
_ITEMSIZE = {
  **dict.fromkeys(('s4', 'u4'), 0.5),
  **dict.fromkeys(('pred', 's8', 'u8'), 1),
  **dict.fromkeys(('s16', 'u16', 'f16', 'bf16'), 2),
  **dict.fromkeys(('s32', 'u32', 'f32'), 4),
  **dict.fromkeys(('s64', 'u64', 'f64'), 8),
}
_ARRAY = re.compile(r'([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?')
_LINE = re.compile(r'\s*(ROOT )?%?([\w.\-]+) = (.*?) ?([a-z][a-z0-9\-]*)\(')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
# A computation of another core ends with `}, execution_thread="sparsecore"`.
_END = re.compile(r'^\}(, execution_thread="\w+")?$')
_CALLED = re.compile(r'(?:calls|to_apply|condition|body)=%?([\w.\-]+)')
_BRANCH = re.compile(r'(?:_computations?=\{?|, )%([\w.\-]+)')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# These instructions move nothing.
_FREE = {
  *('parameter', 'constant', 'iota', 'tuple', 'get-tuple-element', 'bitcast'),
  *('after-all', 'partition-id', 'replica-id', 'opt-barrier', 'domain'),
  *('while', 'call', 'conditional'),
}
_SLICES = {'slice', 'dynamic-slice', 'gather'}
_UPDATES = {'dynamic-update-slice': 1, 'scatter': -1}  # index of the update
_RENAMES = {'bitcast', 'reshape', 'get-tuple-element'}


# --- The text ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape.

  Attributes:
    size: bytes in main memory, padded to the tiles of the layout; 0 for an
      array in a faster memory of the chip.
    logical: bytes of the numbers alone, in any memory.
  """

  size: float
  logical: float


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `%name = shape opcode(operands), attributes`.

  Attributes:
    name: name, unique in the program.
    opcode: for example 'fusion'.
    arrays: arrays of the result, in order.
    operands: names of the operands.
    literal: text between the brackets.
    attributes: text behind the brackets.
    is_root: True for the result of the computation.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str
  is_root: bool

  @property
  def size(self) -> float:
    """Bytes of the result in main memory."""
    return sum(array.size for array in self.arrays)

  @property
  def touched(self) -> float:
    """Bytes of a slice, which is read from or written to main memory."""
    return sum(max(array.size, array.logical) for array in self.arrays)

  @property
  def called(self) -> list[str]:
    """Names of the computations that it calls."""
    return _CALLED.findall(self.attributes)

  def attribute(self, name: str) -> str:
    """The word behind `name=`."""
    return re.search(rf'\b{name}=%?([\w.\-]+)', self.attributes).group(1)


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions of one computation, in order."""

  instructions: tuple[Instruction, ...]

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    """Name -> instruction."""
    return {line.name: line for line in self.instructions}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Name -> instructions that read its result."""
    users: dict[str, list[Instruction]] = {}
    for line in self.instructions:
      for operand in line.operands:
        users.setdefault(operand, []).append(line)
    return users

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """Number -> parameter."""
    lines = (x for x in self.instructions if x.opcode == 'parameter')
    return {int(line.literal): line for line in lines}

  @property
  def root(self) -> Instruction:
    """The result."""
    return next(line for line in self.instructions if line.is_root)


# Computation by name; '' is the entry, where the program begins.
Text = Mapping[str, Computation]


def parse(text: str) -> Text:
  """Parse the result of `compiled.as_text()`."""
  computations: dict[str, Computation] = {}
  name = ''
  lines: list[str] = []
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head and not name:
      name, is_entry, lines = head.group(2), head.group(1), []
    elif _END.match(line) and name:
      parsed = filter(None, map(_instruction, lines))
      computations['' if is_entry else name] = Computation(tuple(parsed))
      name = ''
    elif _LINE.match(line):
      lines.append(line)
    elif name and lines:
      lines[-1] += line  # The attributes of a kernel take several lines.
  return computations


def _instruction(line: str) -> Instruction | None:
  head = _LINE.match(line)
  if not head:
    return None
  depth, end = 1, head.end()
  while depth and end < len(line):
    depth += {'(': 1, ')': -1}.get(line[end], 0)
    end += 1
  inside = line[head.end() : end - 1]
  return Instruction(
    name=head.group(2),
    opcode=head.group(4),
    arrays=arrays(head.group(3)),
    operands=tuple(re.findall(r'%([\w.\-]+)', inside)),
    literal=inside,
    attributes=line[end:],
    is_root=bool(head.group(1)),
  )


def arrays(shape: str) -> tuple[Array, ...]:
  """Arrays of a shape; of a tuple all of them."""
  return tuple(
    _array(_ITEMSIZE.get(dtype, 1), dims, layout)
    for dtype, dims, layout in _ARRAY.findall(shape)
    if dtype in _ITEMSIZE or dtype.startswith('f8')
  )


def _array(itemsize: float, dims_text: str, layout: str) -> Array:
  dims = [int(size) for size in dims_text.split(',') if size]
  logical = math.prod(dims) * itemsize
  space = re.search(r'S\((\d+)\)', layout)  # S(1) and above: not main memory
  if space and space.group(1) != '0':
    return Array(0.0, logical)
  tile = re.search(r'T\(([\d,]+)\)', layout)
  order = re.match(r'\{([\d,]+)', layout)  # from the minor dimension
  if tile and order:
    dims = [dims[i] for i in reversed(_numbers(order.group(1)))]
    for back, size in enumerate(reversed(_numbers(tile.group(1))), start=1):
      if back <= len(dims):
        dims[-back] = -(-dims[-back] // size) * size
  return Array(math.prod(dims) * itemsize, logical)


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(',')]


# --- Loops -------------------------------------------------------------------


def trips(text: Text, loop: Instruction) -> int | None:
  """Return how often a `while` runs its body; None if the data decide.

  The counter starts at 0. The condition compares it with a constant, and the
  body adds a step, which is 2 where the compiler works on pairs.
  """
  known = _KNOWN_TRIPS.search(loop.attributes)
  if known:
    return int(known.group(1))
  condition = text[loop.attribute('condition')]
  bounds = [
    int(line.literal)
    for line in condition.instructions
    if line.opcode == 'constant' and line.literal.isdigit()
  ]
  if not bounds:
    return None
  step, counter = 1, condition.by_name[condition.root.operands[0]]
  body = text[loop.attribute('body')]
  if (counter.opcode, body.root.opcode) == ('get-tuple-element', 'tuple'):
    index = int(counter.attribute('index'))
    step = max(_constants(text, body, body.root.operands[index]), default=1)
  return -(-max(bounds) // step)


def _constants(text: Text, where: Computation, name: str) -> Iterator[int]:
  """Yield the constants that are added up in a scalar."""
  line = where.by_name[name]
  if line.opcode == 'constant' and line.literal.isdigit():
    yield int(line.literal)
  elif line.opcode in ('add', 'copy', 'bitcast', 'fusion'):
    for operand in line.operands:
      yield from _constants(text, where, operand)
  if line.opcode == 'fusion':
    inner = text[line.called[0]]
    yield from _constants(text, inner, inner.root.name)


def _executed(
  text: Text, name: str, times: float, trips_of_data: float
) -> Iterator[tuple[Computation, Instruction, float]]:
  """Yield each executed instruction and how often it runs."""
  where = text[name]
  for line in where.instructions:
    called, often = [], times
    if line.opcode == 'while':
      known = trips(text, line)
      often = times * (trips_of_data if known is None else known)
      called = line.called
    elif line.opcode in ('call', 'call-start', 'async-start'):
      called = line.called
    elif line.opcode == 'conditional':
      # The last branch is the one that works.
      called = _BRANCH.findall(line.attributes)[-1:]
    else:
      yield where, line, times
    for inner in called:
      yield from _executed(text, inner, often, trips_of_data)


# --- Main memory -------------------------------------------------------------


def _moved(text: Text, where: Computation, line: Instruction) -> float:
  """Bytes of main memory that an instruction reads and writes.

  A slice counts as the slice, and an update in place as the update, also
  inside of a fusion: a step of decoding does not rewrite the whole cache.
  """
  if line.opcode in _FREE or line.opcode.endswith('-done'):
    return 0.0
  if line.opcode in ('copy-start', 'slice-start'):
    # Either end may be in faster memory.
    ends = line.arrays[:2]
    moved = ends[line.opcode == 'slice-start'].logical
    return moved * sum(end.size > 0 for end in ends)
  read = 0.0
  for index, name in enumerate(line.operands):
    read += min(where.by_name[name].size, _read(text, line, index))
  written = min(line.size, _written(text, where, line))
  if line.opcode.endswith('-start'):  # Its shape names its operands, too.
    written -= sum(where.by_name[name].size for name in line.operands)
  return read + max(written, 0.0)


def _read(text: Text, line: Instruction, index: int) -> float:
  """Bytes that an instruction reads of an operand; infinite for all of it."""
  if index == 0 and line.opcode in _SLICES:
    return line.touched
  if index == 0 and line.opcode in _UPDATES:
    return 0.0
  if line.opcode == 'fusion':
    inner = text[line.called[0]]
    return _read_by_users(text, inner, inner.parameters[index].name)
  return math.inf


def _read_by_users(text: Text, inner: Computation, name: str) -> float:
  read = 0.0
  for user in inner.users.get(name, []):
    if user.opcode in _RENAMES:
      read += _read_by_users(text, inner, user.name)
      continue
    for index, operand in enumerate(user.operands):
      read += _read(text, user, index) if operand == name else 0.0
  return read


def _written(text: Text, where: Computation, line: Instruction) -> float:
  """Bytes that an instruction writes."""
  if line.opcode in _UPDATES:
    return where.by_name[line.operands[_UPDATES[line.opcode]]].touched
  if line.opcode == 'fusion':
    inner = text[line.called[0]]
    return _written(text, inner, inner.root)
  if line.opcode == 'tuple' or (line.opcode in _RENAMES):
    sources = (where.by_name[name] for name in line.operands)
    return sum(_written(text, where, source) for source in sources)
  return line.touched


# --- Collectives -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind over the same axes, in one call of a program.

  Attributes:
    kind: for example 'all-gather'.
    axes: mesh axes that it crosses, for example 'fsdp'.
    count: number of times that it runs.
    ici: bytes that a chip sends within its slice.
    dcn: bytes that a chip sends to other slices.
  """

  kind: str
  axes: str
  count: float
  ici: float
  dcn: float


@dataclasses.dataclass(frozen=True)
class Layout:
  """Mesh axes of the devices, in the order of their numbers.

  Attributes:
    axes: axis -> size.
    inside: axis -> size within one slice; slices follow each other.
  """

  axes: Mapping[str, int]
  inside: Mapping[str, int]

  @property
  def size(self) -> int:
    """Number of devices."""
    return math.prod(self.axes.values())

  @property
  def slice_chips(self) -> int:
    """Number of devices of one slice."""
    return math.prod(self.inside.values())

  def crossed(self, group: np.ndarray, numbered: int) -> str:
    """Names of the axes along which the members of a group differ.

    Args:
      group: numbers of the members.
      numbered: number of devices that the program numbers; with several
        slices these may be the devices of one slice.
    """
    axes = self.inside if numbered == self.slice_chips else self.axes
    places = np.unravel_index(group, tuple(axes.values()))
    pairs = zip(axes, places, strict=True)
    names = [name for name, place in pairs if len(set(place.tolist())) > 1]
    return ' x '.join(names) or 'none'

  def slices(self, group: np.ndarray) -> int:
    """Number of slices that a group spans."""
    return len(set((group // self.slice_chips).tolist()))


def kind_of(line: Instruction) -> str:
  """One of KINDS, or '' for an instruction that is not a collective.

  Between slices a chip hands its data to its host by `send`.
  """
  if line.opcode == 'send':
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.attributes)
    return kind.group(1).lower().replace('_', '-') if kind else ''
  opcode = line.opcode.removesuffix('-start')
  return opcode if opcode in KINDS else ''


def sent(line: Instruction, layout: Layout) -> Collective:
  """Return the bytes that a chip sends in one run of a collective."""
  kind = kind_of(line)
  if line.opcode == 'send':
    slices = layout.size // layout.slice_chips
    whole = line.arrays[0].logical  # (data, context, token)
    return Collective(kind, 'slices', 1.0, 0.0, whole * _share(kind, slices))
  whole = _result(line)
  if kind == 'collective-permute':
    listed = re.search(r'source_target_pairs=\{(.*?)\}\}', line.attributes)
    pairs = re.findall(r'(\d+),(\d+)', listed.group(1) if listed else '')
    moves = np.array([(int(a), int(b)) for a, b in pairs if a != b])
    if not moves.size:
      return Collective(kind, 'none', 1.0, 0.0, 0.0)
    chips = layout.slice_chips
    axes = layout.crossed(moves[0], chips if moves.max() < chips else 0)
    away = any(layout.slices(pair) > 1 for pair in moves)
    return Collective(kind, axes, 1.0, whole * (not away), whole * away)
  group, numbered = first_group(line.attributes, layout)
  n, slices = len(group), layout.slices(group)
  if n == 1:
    return Collective(kind, 'none', 1.0, 0.0, 0.0)
  axes, own = layout.crossed(group, numbered), n // slices
  if kind in ('all-to-all', 'ragged-all-to-all'):
    ici, dcn = whole * (own - 1) / n, whole * (n - own) / n
  else:
    # Within the slice first, so that a chip sends only its share to others.
    whole *= n if kind == 'reduce-scatter' else 1
    passes = 2 if kind == 'all-reduce' else 1
    ici = passes * whole * (own - 1) / own
    dcn = passes * whole / own * (slices - 1) / slices
  return Collective(kind, axes, 1.0, ici, dcn)


def _share(kind: str, slices: int) -> float:
  """Bytes that a host sends for each byte that a chip hands to it."""
  rest = (slices - 1) / slices
  shares = {'all-reduce': 2 * rest, 'all-gather': slices - 1}
  shares |= {'reduce-scatter': rest, 'all-to-all': rest}
  return shares.get(kind, 1)


def _result(line: Instruction) -> float:
  """Bytes of the result of a collective.

  The `-start` of a collective names its operands before its results, except
  for sums, whose results are as large as the operands.

  Raises:
    ValueError: if its shape has another number of arrays.
  """
  sizes = [array.logical for array in line.arrays]
  count = len(line.operands)
  if line.opcode.endswith('-start') and len(sizes) >= 2 * count:
    return sum(sizes[count : 2 * count])
  if len(sizes) == count:
    return sum(sizes)
  raise ValueError(
    f'{line.name}, {line.opcode} of {count} operands, has {len(sizes)} results.'
  )


def first_group(attributes: str, layout: Layout) -> tuple[np.ndarray, int]:
  """(first replica group, number of devices in all groups) of a collective."""
  text = re.search(r'replica_groups=(.*)', attributes)
  text = text.group(1) if text else ''
  iota = re.match(r'\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', text)
  if iota:
    ids = _iota(iota.group(2))
    return ids.reshape(_numbers(iota.group(1)))[0], ids.size
  mesh = re.match(
    r'mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{(.*?)\}', text
  )
  if mesh:
    return _mesh_group(*mesh.groups())
  listed = re.match(r'\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}', text)
  if listed:
    groups = [_numbers(x) for x in listed.group(1)[1:-1].split('},{')]
    return np.array(groups[0]), sum(map(len, groups))
  return np.arange(layout.size), layout.size


def _iota(text: str) -> np.ndarray:
  """Numbers of `[4,2]T(1,0)`: counted, then transposed."""
  dims, order = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups()
  ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
  return ids.transpose(_numbers(order)) if order else ids


def _mesh_group(axes: str, ids_text: str | None, chosen: str):
  """Group of `mesh['a'=2,'b'=4] {'b'}`; `'b':(1)2` is a part of an axis."""
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
  count = math.prod(sizes.values())
  ids = _iota(ids_text or f'[{count}]').reshape(tuple(sizes.values()))
  index: list[np.ndarray] = [np.array([0])] * len(sizes)
  pattern = r"'(\w+)'(?::\((\d+)\)(\d+))?"
  for name, before, part in re.findall(pattern, chosen):
    parts = int(part or sizes[name])
    stride = sizes[name] // (int(before or 1) * parts)
    index[list(sizes).index(name)] = np.arange(parts) * stride
  return ids[np.ix_(*index)].reshape(-1), count


# --- All of it ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Bytes that one chip moves in one call of a program.

  Attributes:
    read_written: bytes of main memory.
    collectives: collectives by kind and axes.
    kernels: name of a hand-written kernel -> number of its runs.
  """

  read_written: float
  collectives: tuple[Collective, ...]
  kernels: dict[str, float]


def traffic(text: Text, layout: Layout, *, trips: float = 1.0) -> Traffic:
  """Add up a program.

  Args:
    text: the compiled program.
    layout: the layout of its devices.
    trips: number of runs of a loop whose length only the data decide.
  """
  moved, kernels = 0.0, {}
  wires: dict[Any, tuple[float, Instruction]] = {}
  for where, line, times in _executed(text, '', 1.0, trips):
    moved += times * _moved(text, where, line)
    if line.opcode == 'custom-call' and 'tpu_custom_call' in line.attributes:
      name = re.sub(r'[.\d]*$', '', line.name)
      kernels[name] = kernels.get(name, 0.0) + times
    for wire in _collectives(text, line):
      key = _identity(wire)
      # A piece in an inner loop continues what the outer loop began.
      before = wires[key][0] if key in wires else math.inf
      wires[key] = min(times, before), wire
  sums: dict[tuple[str, str], np.ndarray] = {}
  for times, wire in wires.values():
    kind, axes, *numbers = dataclasses.astuple(sent(wire, layout))
    sums[kind, axes] = sums.get((kind, axes), 0.0) + times * np.array(numbers)
  collectives = tuple(
    Collective(*key, *map(float, numbers))
    for key, numbers in sorted(sums.items())
  )
  return Traffic(moved, collectives, kernels)


def _collectives(text: Text, line: Instruction) -> Iterator[Instruction]:
  """Yield the collective of a line, or the collectives fused in it."""
  if kind_of(line):
    yield line
  elif line.opcode == 'fusion':
    for name in line.called:
      for inner in text[name].instructions:
        for found in _collectives(text, inner):
          if name.startswith('all-reduce-scatter'):
            # TPUs write a reduce-scatter as a sum and a slice of it.
            found = dataclasses.replace(
              found, opcode='reduce-scatter', arrays=line.arrays
            )
          yield found


def _identity(line: Instruction) -> Any:
  """A key that the pieces of one collective share.

  The compiler may spread a collective over several fusions to overlap it with
  their products. The pieces share channel, size and groups.
  """
  channel = re.search(r'channel_id=(\d+)', line.attributes)
  if not channel or 'async_collective_fusion_config' not in line.attributes:
    return line.name
  groups = re.search(r'replica_groups=[^ ]*', line.attributes)
  sizes = tuple(array.logical for array in line.arrays)
  return channel.group(1), sizes, groups and groups.group()
