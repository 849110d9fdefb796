"""How often the loops of a compiled program run.

The counter of a loop is the element of its state that the condition compares
with a constant; the body adds its step to it. A loop that works off several
pieces at a time has a step above one. Counters may be worked out inside of
fusions, so values are followed through them.
"""

import dataclasses
import re
from collections.abc import Mapping

from actfocus_jax.aot import program_text
from actfocus_jax.aot.program_text import Computation, Instruction, Text

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME = ('copy', 'bitcast', 'convert', 'reshape', 'copy-start', 'copy-done')


@dataclasses.dataclass(frozen=True)
class _Value:
  """`number`, or element `index` of the loop's state plus `number`."""

  number: int
  index: int | None = None


def trips(text: Text, where: Computation, loop: Instruction) -> int | None:
  """How often a `while` runs its body.

  Args:
    text: The program.
    where: Where the loop stands.
    loop: The `while`.

  Returns:
    The number; None if only the data decide.
  """
  known = _KNOWN.search(loop.attributes)
  if known:
    return int(known.group(1))
  condition = text.computations[program_text.condition_of(loop)]
  found = _bound(text, condition)
  if found is None:
    return None
  index, bound = found
  body = text.computations[program_text.body_of(loop)]
  step = _element(text, body, body.root.name, index, {})
  is_counted = step is not None and step.index == index and step.number > 0
  first = _element(text, where, loop.operands[0], index, {})
  begin = first.number if first is not None and first.index is None else 0
  return max(0, -(-(bound - begin) // (step.number if is_counted else 1)))


def _bound(
  text: Text, where: Computation, given=None
) -> tuple[int, int] | None:
  """(index of the counter, its bound) of the first comparison that has both."""
  given = given or {}
  for one in where.instructions:
    if one.opcode == 'compare' and 'direction=LT' in one.attributes:
      left, right = (_value(text, where, x, given) for x in one.operands)
      if left and right and left.index is not None and right.index is None:
        return left.index, right.number - left.number
    for name in one.called if one.opcode in ('fusion', 'call') else ():
      inner = text.computations[name]
      found = _bound(text, inner, _passed(text, where, one, inner, given))
      if found:
        return found
  return None


def _passed(text, where, one: Instruction, inner: Computation, given):
  """What is known of the parameters of a computation that is called."""
  known = {}
  for number, parameter in inner.parameters.items():
    if number < len(one.operands):
      value = _value(text, where, one.operands[number], given)
      if value is not None:
        known[parameter.name] = value
  return known


def _value(
  text: Text, where: Computation, name: str, given: Mapping[str, _Value]
) -> _Value | None:
  """What a scalar is, as far as it is a sum of constants and a counter."""
  if name in given:
    return given[name]
  one = where.by_name.get(name)
  if one is None:
    return None
  if one.opcode == 'constant' and re.fullmatch(r'-?\d+', one.literal):
    return _Value(int(one.literal))
  if one.opcode in _SAME:
    return _value(text, where, one.operands[0], given)
  if one.opcode == 'get-tuple-element':
    index = int(re.search(r'index=(\d+)', one.attributes).group(1))
    return _element(text, where, one.operands[0], index, given)
  if one.opcode == 'add':
    return _sum(*(_value(text, where, x, given) for x in one.operands))
  if one.opcode == 'fusion':
    inner = text.computations[one.called[0]]
    known = _passed(text, where, one, inner, given)
    return _value(text, inner, inner.root.name, known)
  return None


def _element(text, where, name: str, index: int, given) -> _Value | None:
  """Element `index` of a tuple."""
  one = where.by_name.get(name)
  if one is None:
    return None
  if one.opcode == 'parameter':
    return _Value(0, index)
  if one.opcode == 'tuple' and index < len(one.operands):
    return _value(text, where, one.operands[index], given)
  if one.opcode == 'fusion':
    inner = text.computations[one.called[0]]
    known = _passed(text, where, one, inner, given)
    return _element(text, inner, inner.root.name, index, known)
  return None


def _sum(left: _Value | None, right: _Value | None) -> _Value | None:
  if left is None or right is None:
    return None
  if left.index is not None and right.index is not None:
    return None
  index = right.index if left.index is None else left.index
  return _Value(left.number + right.number, index)
