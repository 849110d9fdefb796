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
from typing import Any, NamedTuple

import numpy as np

from actfocus_jax.aot import collectives, loops, program_text

Collective = collectives.Collective
Instruction = program_text.Instruction
Layout = collectives.Layout

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


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one call of a program moves, for each chip.

  Attributes:
    read_written: Bytes of main memory.
    copied: Of them, by copies alone: layouts that do not fit each other.
    in_kernels: Of them, by the hand-written kernels.
    cycles: The compiler's own estimate of computation and memory, without the
      kernels, of which it has none.
    collectives: By kind and axes.
    kernels: Names of the hand-written kernels in it, with their number.
  """

  read_written: float
  copied: float
  in_kernels: float
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
  sums = {'bytes': 0.0, 'copied': 0.0, 'in_kernels': 0.0, 'cycles': 0.0}
  wires: dict[Any, Wire] = {}
  kernels: dict[str, float] = {}
  for where, one, times in _executed(text, text.entry, 1.0, trips):
    size = _moved(text, where, one)
    sums['bytes'] += times * size
    if one.opcode in ('copy', 'transpose'):
      sums['copied'] += times * size
    kernel = _kernel(one)
    if kernel:
      kernels[kernel] = kernels.get(kernel, 0.0) + times
      sums['in_kernels'] += times * size
    else:
      sums['cycles'] += times * one.cycles
    for inner in _collectives(text, one):
      key = _identity(inner)
      # A part of one in an inner loop goes on with what the outer one began.
      times_before = wires[key].times if key in wires else math.inf
      wires[key] = Wire(min(times, times_before), where.name, inner)
  found = _summed(list(wires.values()), layout)
  return Traffic(*sums.values(), found, kernels)


class Wire(NamedTuple):
  """A collective, how often it runs, and where."""

  times: float
  where: str
  one: Instruction


def _identity(one: Instruction) -> Any:
  """What is the same in all pieces of one collective, and in no other.

  The compiler may spread one over several fusions, to overlap it with what
  they compute: those pieces share a channel, and so may others of other sizes
  and groups, which `shard_map` numbers alike.
  """
  channel = re.search(r'channel_id=(\d+)', one.attributes)
  if not channel or 'async_collective_fusion_config' not in one.attributes:
    return one.name
  groups = re.search(r'replica_groups=[^ ]*', one.attributes)
  return channel.group(1), _sizes(one), groups and groups.group()


def _summed(wires: list[Wire], layout: Layout) -> tuple[Collective, ...]:
  found: dict[tuple[str, str], np.ndarray] = {}
  sent = {(x.where, collectives.pairs(x.one), _sizes(x.one)) for x in wires}
  for times, where, one in wires:
    # The compiler sends both ways round a ring at a time.
    back = frozenset((b, a) for a, b in collectives.pairs(one))
    ways = 2 if back and (where, back, _sizes(one)) in sent else 1
    told = collectives.wire(one, layout, ways=ways)
    kind, axes, *wire = dataclasses.astuple(told)
    found[kind, axes] = found.get((kind, axes), 0.0) + times * np.array(wire)
  return tuple(
    Collective(*key, *map(float, sums)) for key, sums in sorted(found.items())
  )


def _sizes(one: Instruction) -> tuple[float, ...]:
  return tuple(array.logical for array in one.arrays)


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


def _kernel(one: Instruction) -> str:
  """The name of the kernel that an instruction calls, or ''."""
  if one.opcode != 'custom-call' or 'tpu_custom_call' not in one.attributes:
    return ''
  return re.sub(r'[.\d]*$', '', one.name)


def _collectives(text, one: Instruction) -> Iterator[Instruction]:
  """The collective that an instruction is, or those that are fused in it."""
  if collectives.kind_of(one):
    yield one
  elif one.opcode == 'fusion':
    for name in one.called:
      for inner in text.computations[name].instructions:
        for found in _collectives(text, inner):
          is_cut = name.startswith('all-reduce-scatter')
          yield _scattered(found, one) if is_cut else found


def _scattered(inner: Instruction, fusion: Instruction) -> Instruction:
  """A sum of which the fusion keeps one part: TPUs write it as all of it."""
  if inner.opcode != 'all-reduce':
    return inner
  return dataclasses.replace(
    inner, opcode='reduce-scatter', arrays=fusion.arrays
  )
