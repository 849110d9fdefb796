"""Collectives in the text of a compiled program.

A collective in the body of a loop counts as often as the loop runs. The text of
a program for several slices numbers the chips of one slice; what goes to the
other slices is a `send` from a chip to its host.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = (
  *('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all'),
  *('ragged-all-to-all', 'collective-permute', 'collective-broadcast'),
)
_BITS = {'pred': 8} | {
  f'{kind}{bits}': bits
  for kind in ('s', 'u', 'f', 'bf')
  for bits in (4, 8, 16, 32, 64)
}
_ARRAY = re.compile(r'([a-z]+\d*)\w*\[([\d,]*)\]')
_LINE = re.compile(
  r'\s*(ROOT )?%?([\w.\-]+) = (.*?) ?([a-z][a-z0-9\-]*)\((.*?)\)(.*)'
)
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
# A computation of another core ends with `}, execution_thread="sparsecore"`.
_END = re.compile(r'^\}(, execution_thread="\w+")?$')
_CALLED = re.compile(r'(?:calls|to_apply|condition|body)=%?([\w.\-]+)')
_CALLS = ('while', 'call', 'call-start', 'async-start', 'fusion')
_BRANCH = re.compile(r'(?:_computations?=\{?|, )%([\w.\-]+)')


class Line(NamedTuple):
  """An instruction: `ROOT %name = shape opcode(inside), attributes`."""

  root: str | None
  name: str
  shape: str
  opcode: str
  inside: str
  attributes: str

  @property
  def operands(self) -> list[str]:
    """Names of the operands."""
    return re.findall(r'%([\w.\-]+)', self.inside)

  def attribute(self, name: str) -> str:
    """Return the value of the attribute `name`."""
    return re.search(rf'\b{name}=%?([\w.\-]+)', self.attributes)[1]


# Name of a computation -> its instructions; '' is where the program begins.
Text = Mapping[str, list[Line]]


def parse(text: str) -> Text:
  """Parse the result of `compiled.as_text()`."""
  computations: dict[str, list[Line]] = {}
  name = None
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head and name is None:
      name = '' if head.group(1) else head.group(2)
      computations[name] = []
    elif _END.match(line):
      name = None
    elif name is not None and (match := _LINE.match(line)):
      computations[name].append(Line(*match.groups()))
  return computations


# --- Loops -------------------------------------------------------------------


def trips(text: Text, loop: Line) -> int | None:
  """Return the number of runs of a loop; None if the data decide.

  Compilers for CPUs write it down. That for TPUs does not: there the counter is
  the first element of the state, and the condition compares it with a constant.
  The step is 2 if the compiler joined two runs of the body.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
  if known:
    return int(known.group(1))
  condition = text[loop.attribute('condition')]
  bounds = [int(x.inside) for x in condition if _is_number(x)]
  if not bounds:
    return None
  body = text[loop.attribute('body')]
  step = max(_added(text, body, _result(body).operands[0]), default=1)
  return math.ceil(max(bounds) / step)


def _result(lines: list[Line]) -> Line:
  return next(line for line in lines if line.root)


def _is_number(line: Line) -> bool:
  return line.opcode == 'constant' and line.inside.isdigit()


def _added(text: Text, lines: list[Line], name: str) -> Iterator[int]:
  """Yield the constants that are added up in a scalar."""
  line = next(line for line in lines if line.name == name)
  if _is_number(line):
    yield int(line.inside)
  elif line.opcode in ('add', 'copy', 'bitcast', 'fusion'):
    for operand in line.operands:
      yield from _added(text, lines, operand)
  if line.opcode == 'fusion':
    inner = text[line.attribute('calls')]
    yield from _added(text, inner, _result(inner).name)


# --- Collectives -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind in one call of a program.

  Attributes:
    kind: one of KINDS.
    network: 'ici' within a slice, 'dcn' between slices.
    count: number of runs.
    sent: bytes that a chip sends.
  """

  kind: str
  network: str
  count: float
  sent: float


def collectives(
  text: Text, slice_chips: int, slices: int = 1, *, data_trips: float = 1.0
) -> list[Collective]:
  """Add up the collectives of a program.

  Args:
    text: the compiled program.
    slice_chips: number of chips of a slice.
    slices: number of slices.
    data_trips: number of runs of a loop whose length only the data decide.
  """
  runs: dict[tuple[str, ...], tuple[float, Line]] = {}
  for line, times in _executed(text, '', 1.0, data_trips):
    key = _identity(line)
    # A piece in an inner loop continues what the outer loop began.
    before = runs[key][0] if key in runs else math.inf
    runs[key] = min(times, before), line
  counts, bytes_sent = collections.Counter(), collections.Counter()
  for times, line in runs.values():
    key = _kind(line), 'dcn' if line.opcode == 'send' else 'ici'
    counts[key] += times
    bytes_sent[key] += times * sent(line, slice_chips, slices)
  return [Collective(*x, counts[x], bytes_sent[x]) for x in sorted(counts)]


def _executed(
  text: Text, name: str, times: float, data_trips: float
) -> Iterator[tuple[Line, float]]:
  """Yield each executed collective and how often it runs."""
  for line in text[name]:
    called, often = [], times
    if _kind(line):
      yield line, times
    elif line.opcode in _CALLS:
      called = _CALLED.findall(line.attributes)
    elif line.opcode == 'conditional':
      # The last branch is the one that works.
      called = _BRANCH.findall(line.attributes)[-1:]
    if line.opcode == 'while':
      number = trips(text, line)
      often = times * (data_trips if number is None else number)
    for inner in called:
      for found, count in _executed(text, inner, often, data_trips):
        if inner.startswith('all-reduce-scatter'):
          # The TPU compiler lowers a reduce-scatter to an all-reduce and a
          # slice.
          found = found._replace(opcode='reduce-scatter', shape=line.shape)
        yield found, count


def _kind(line: Line) -> str:
  """One of KINDS, or '' for an instruction that is not a collective."""
  if line.opcode == 'send':
    kind = re.search(r'megascale_transfer_type="(\w+)"', line.attributes)
    return kind.group(1).lower().replace('_', '-') if kind else ''
  opcode = line.opcode.removesuffix('-start')
  return opcode if opcode in KINDS else ''


def _identity(line: Line) -> tuple[str, ...]:
  """A key that the pieces of one collective share.

  The compiler may spread a collective over several fusions to overlap it with
  their products. The pieces share channel, size and groups.
  """
  channel = re.search(r'channel_id=\d+', line.attributes)
  if not channel or 'async_collective_fusion_config' not in line.attributes:
    return (line.name,)
  groups = re.search(r'replica_groups=[^ ]*', line.attributes)
  return channel[0], str(_sizes(line.shape)), groups[0] if groups else ''


def sent(line: Line, slice_chips: int, slices: int = 1) -> float:
  """Return the bytes that a chip sends in one run of a collective."""
  kind, sizes, count = _kind(line), _sizes(line.shape), len(line.operands)
  if line.opcode == 'send':  # (data, context, token)
    rest = (slices - 1) / slices
    shares = {'all-reduce': 2 * rest, 'all-gather': slices - 1}
    shares |= {'reduce-scatter': rest, 'all-to-all': rest}
    return sizes[0] * shares.get(kind, 1)
  # The `-start` of a collective names its operands before its results, except
  # for sums, whose results are as large as the operands.
  if line.opcode.endswith('-start') and len(sizes) >= 2 * count:
    sizes = sizes[count : 2 * count]
  if len(sizes) != count:
    found = f'{line.opcode} of {count} operands, has {len(sizes)} results.'
    raise ValueError(f'{line.name}, {found}')
  whole = sum(sizes)
  if kind == 'collective-permute':
    pairs = re.findall(r'\{(\d+),(\d+)\}', line.attributes)
    return whole if any(a != b for a, b in pairs) else 0.0
  n = group_size(line.attributes, slice_chips)
  if kind == 'reduce-scatter':
    return whole * (n - 1)
  return whole * (n - 1) / n * (2 if kind == 'all-reduce' else 1)


def _sizes(shape: str) -> list[float]:
  """Bytes of the arrays of a shape, without padding."""
  return [
    math.prod(int(n) for n in dims.split(',') if n) * _BITS[dtype] / 8
    for dtype, dims in _ARRAY.findall(shape)
    if dtype in _BITS
  ]


def group_size(attributes: str, slice_chips: int) -> int:
  """Number of chips that take part in one collective."""
  text = re.search(r'replica_groups=(.*)', attributes)
  text = text.group(1) if text else ''
  if counted := re.match(r'\[\d+,(\d+)\]<=', text):  # [groups,size]<=[...]
    return int(counted.group(1))
  if listed := re.match(r'\{\{([\d,]+)\}', text):
    return len(listed.group(1).split(','))
  if mesh := re.match(r'mesh\[([^\]]*)\].*? \{(.*?)\}', text):
    # mesh['a'=2,'b'=4] {'b'}; 'b':(1)2 is a part of the axis 'b'.
    axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
    chosen = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh.group(2))
    return math.prod(int(part or axes[name]) for name, part in chosen)
  return slice_chips
