"""Reads the text of a compiled program: instructions, shapes, loops.

The life of a line: `%name = shape opcode(operands), attributes`. Lines stand
in computations, computations call each other: a `while` its body and its
condition, a `fusion` what it fuses. Only what a cost needs is kept.
"""

import dataclasses
import functools
import math
import re

_ITEMSIZE = {
  'pred': 1,
  's4': 0.5,
  'u4': 0.5,
  's8': 1,
  'u8': 1,
  's16': 2,
  'u16': 2,
  'f16': 2,
  'bf16': 2,
  's32': 4,
  'u32': 4,
  'f32': 4,
  's64': 8,
  'u64': 8,
  'f64': 8,
}
_ARRAY = re.compile(r'([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?')
_HEAD = re.compile(r'\s*(ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r' ?([a-z][a-z0-9\-]*)\(')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
# Of one that another core runs: `}, execution_thread="sparsecore"`.
_END = re.compile(r'^\}(, execution_thread="\w+")?$')
_NAME = re.compile(r'%([\w.\-]+)')
_TILE = re.compile(r'T\(([\d,]+)\)')
_CALLED = re.compile(r'(?:calls|to_apply|condition|body)=%?([\w.\-]+)')
_NOT_KNOWN = 2**62  # The largest number stands for no estimate.
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape.

  Attributes:
    dtype: E.g. 'bf16'.
    dims: Its sizes.
    size: Bytes in main memory, padded to the tiles of its layout; 0 for what
      the compiler keeps in a faster memory of the chip.
    logical: Bytes of its numbers alone, wherever they are.
  """

  dtype: str
  dims: tuple[int, ...]
  size: float
  logical: float


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line.

  Attributes:
    name: Unique in the program.
    opcode: E.g. 'fusion'.
    arrays: Of the result, in order.
    operands: Names.
    attributes: All that follows the operands.
    literal: What stands between the brackets.
    is_root: Whether it is the computation's result.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  literal: str
  is_root: bool

  @property
  def size(self) -> float:
    """Bytes of the result in main memory."""
    return sum(array.size for array in self.arrays)

  @property
  def called(self) -> tuple[str, ...]:
    """Computations that it calls."""
    return tuple(_CALLED.findall(self.attributes))

  @property
  def cycles(self) -> int:
    """The compiler's own estimate; 0 where it gives none."""
    found = _CYCLES.search(self.attributes)
    cycles = int(found.group(1)) if found else 0
    return cycles if cycles < _NOT_KNOWN else 0


@dataclasses.dataclass(frozen=True)
class Computation:
  """The instructions of one computation, in their order."""

  name: str
  instructions: tuple[Instruction, ...]

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    """Instructions by their names."""
    return {one.name: one for one in self.instructions}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Who reads the result of each instruction."""
    users: dict[str, list[Instruction]] = {}
    for one in self.instructions:
      for operand in one.operands:
        users.setdefault(operand, []).append(one)
    return users

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """Parameters by their number."""
    return {
      int(one.literal): one
      for one in self.instructions
      if one.opcode == 'parameter'
    }

  @property
  def root(self) -> Instruction:
    """The result."""
    return next(one for one in self.instructions if one.is_root)


@dataclasses.dataclass(frozen=True)
class Text:
  """A program.

  Attributes:
    computations: By name.
    entry: The name of the first one.
  """

  computations: dict[str, Computation]
  entry: str


def body_of(loop: Instruction) -> str:
  """The name of what a `while` repeats."""
  return re.search(r'body=%?([\w.\-]+)', loop.attributes).group(1)


def condition_of(loop: Instruction) -> str:
  """The name of what a `while` asks before each repetition."""
  return re.search(r'condition=%?([\w.\-]+)', loop.attributes).group(1)


def parse(text: str) -> Text:
  """Reads `compiled.as_text()`."""
  computations, entry, name = {}, '', ''
  lines: list[str] = []
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head and not name:
      name, lines = head.group(2), []
      entry = name if head.group(1) else entry
    elif _END.match(line) and name:
      found = (_instruction(one) for one in lines)
      computations[name] = Computation(name, tuple(filter(None, found)))
      name = ''
    elif _HEAD.match(line):
      lines.append(line)
    elif name and lines:
      lines[-1] += line  # What is said of kernels takes several lines.
  return Text(computations, entry)


def _instruction(line: str) -> Instruction | None:
  head = _HEAD.match(line)
  if not head:
    return None
  shape_end = _end_of_shape(line, head.end())
  opcode = _OPCODE.match(line, shape_end)
  if not opcode:
    return None
  close = _closing(line, opcode.end() - 1)
  inside = line[opcode.end() : close]
  return Instruction(
    name=head.group(2),
    opcode=opcode.group(1),
    arrays=arrays(line[head.end() : shape_end]),
    operands=_operands(inside),
    attributes=line[close + 1 :],
    literal=inside,
    is_root=bool(head.group(1)),
  )


def _end_of_shape(line: str, start: int) -> int:
  if line[start] == '(':
    return _closing(line, start) + 1
  end = start
  while end < len(line) and line[end] != ' ':
    end += 1
  return end


def _closing(line: str, start: int) -> int:
  """The bracket that closes the one at `start`."""
  depth = 0
  for i in range(start, len(line)):
    depth += (line[i] == '(') - (line[i] == ')')
    if not depth:
      return i
  return len(line)


def _operands(inside: str) -> tuple[str, ...]:
  named = _NAME.findall(inside)
  if named or not inside:
    return tuple(named)
  # Without the percent signs: `bf16[8]{0} dot.1, f32[] constant.2`.
  words = (piece.split()[-1] for piece in inside.split(', ') if piece.split())
  return tuple(w for w in words if re.fullmatch(r'[A-Za-z_][\w.\-]*', w))


def arrays(shape: str) -> tuple[Array, ...]:
  """The arrays of a shape, of a tuple all of them."""
  return tuple(
    _array(dtype, dims, layout or '')
    for dtype, dims, layout in _ARRAY.findall(shape)
    if dtype in _ITEMSIZE or dtype.startswith('f8')
  )


def _array(dtype: str, dims_text: str, layout: str) -> Array:
  itemsize = _ITEMSIZE.get(dtype, 1)
  dims = tuple(int(size) for size in dims_text.split(',') if size)
  logical = math.prod(dims) * itemsize
  # S(1), S(2), ... are other memories than the main one.
  space = re.search(r'S\((\d+)\)', layout)
  if space and space.group(1) != '0':
    return Array(dtype, dims, 0.0, logical)
  return Array(
    dtype, dims, math.prod(_padded(dims, layout)) * itemsize, logical
  )


def _padded(dims: tuple[int, ...], layout: str) -> list[int]:
  """Sizes rounded up to the first tile, from the major to the minor one."""
  tile = _TILE.search(layout)
  order = re.match(r'\{([\d,]*)', layout)
  if not tile or not order or not order.group(1):
    return list(dims)
  minor_to_major = [int(i) for i in order.group(1).split(',')]
  sizes = [dims[i] for i in reversed(minor_to_major)]
  tiles = [int(size) for size in tile.group(1).split(',')]
  for back, size in enumerate(reversed(tiles), start=1):
    if back <= len(sizes):
      sizes[-back] = -(-sizes[-back] // size) * size
  return sizes
