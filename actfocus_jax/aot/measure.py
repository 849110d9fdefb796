"""Compile a program and measure it: FLOPs, memory, collectives.

1. The program is traced, and its matrix products are counted.
2. It is compiled for devices that need not exist.
3. The memory is what the compiler plans.
4. The collectives stand in the text of the compiled program (`hlo`).

A program for which the memory of a chip does not suffice is a result as well.
"""

import dataclasses
import functools
import gc
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from actfocus_jax.aot import hlo, programs

# --- FLOPs -------------------------------------------------------------------

# A product of float32 numbers takes so many passes of the matrix units.
_PASSES = {
  jax.lax.Precision.DEFAULT: 1,
  jax.lax.Precision.HIGH: 3,
  jax.lax.Precision.HIGHEST: 6,
}
# A causal kernel visits every second block of its grid.
_CAUSAL = ('splash', 'flash')


def flops(jaxpr: Any, *, trips: float = 1.0) -> float:
  """Count the FLOPs of a traced program, over all devices together.

  The compiler's own count takes the body of a loop once; here it is multiplied
  by the length of the loop. Matrix products count, 2 m n k each; element-wise
  operations do not.

  Args:
    jaxpr: a jaxpr, closed or not.
    trips: runs of a loop whose length only the data decide.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  return sum(_flops(equation, trips) for equation in jaxpr.eqns)


def _flops(equation: Any, trips: float) -> float:
  name, params = equation.primitive.name, equation.params
  count = functools.partial(flops, trips=trips)
  if name == 'dot_general':
    return _product(equation)
  if name == 'scan':
    return params['length'] * count(params['jaxpr'])
  if name == 'while':
    return trips * (count(params['body_jaxpr']) + count(params['cond_jaxpr']))
  if name == 'cond':
    return max(map(count, params['branches']))
  if name == 'shard_map':
    mesh, manual = params['mesh'], params['newly_manual_axes']
    blocks = math.prod(mesh.shape[axis] for axis in manual)
    return blocks * count(params['jaxpr'])
  if name == 'pallas_call':
    grid = params['grid_mapping'].grid
    steps = math.prod(x for x in grid if isinstance(x, int))
    is_causal = any(word in str(params.get('name')) for word in _CAUSAL)
    return steps * count(params['jaxpr']) / (2 if is_causal else 1)
  return sum(map(count, _inner(params)))


def _product(equation: Any) -> float:
  left = equation.invars[0].aval
  (contracted, _), _ = equation.params['dimension_numbers']
  depth = math.prod(left.shape[axis] for axis in contracted)
  precision, passes = equation.params['precision'], 1
  if precision is not None and 'f' in str(left.dtype):
    passes = max(_PASSES.get(x, 1) for x in precision)
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth * passes


def _inner(params: dict[str, Any]) -> list[Any]:
  """Programs inside of a call, without those of a custom derivative."""
  inner = []
  for name, value in params.items():
    if name in ('fwd_jaxpr_thunk', 'jvp_jaxpr_fun', 'bwd'):
      continue
    for x in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(getattr(x, 'jaxpr', x), 'eqns'):
        inner.append(x)
  return inner


# --- Memory ------------------------------------------------------------------

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_SIZE = r'([\d.]+)([KMGT]?)i?B?'
# The two sentences with which the compiler refuses.
_REFUSALS = (
  rf'[Uu]sed {_SIZE} of {_SIZE} hbm',
  rf'required for [^(]*\({_SIZE}\) exceeds available HBM \({_SIZE}\)',
)


def usable(device: Any) -> float:
  """Bytes of main memory that the compiler plans with.

  It names them only when it refuses, so the program is larger than any chip.
  """
  where = NamedSharding(jax.sharding.Mesh([device], ('one',)), P())
  huge = jax.ShapeDtypeStruct((2**40,), jnp.float32, sharding=where)
  try:
    jax.jit(lambda x: x + 1).lower(huge).compile()
  except jax.errors.JaxRuntimeError as error:
    refusal = refused(str(error))
    if refusal:
      return refusal[1]
  raise ValueError('The compiler does not say how much memory a chip has.')


def refused(message: str) -> tuple[float, float] | None:
  """(needed, available) bytes of a refusal; None for another error."""
  matches = (re.search(pattern, message) for pattern in _REFUSALS)
  match = next(filter(None, matches), None)
  if not match:
    return None
  needed, unit, available, other = match.groups()
  return float(needed) * _UNITS[unit], float(available) * _UNITS[other]


# --- A program ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
  """One call of a program on one chip.

  Attributes:
    name: name of the program.
    phase: 'rollout', 'score' or 'update'.
    calls: calls in one iteration.
    moved: bytes that a chip reads and writes in a call at least.
    flops: FLOPs of matrix products.
    outside: bytes of the parts that stay in memory while it runs.
    arguments: bytes of the arguments.
    temporaries: bytes needed beside them, with the results unless they take
      the place of an argument; of a program that does not compile, all bytes.
    compiles: False if the compiler refused for lack of memory.
    collectives: collectives by kind and network.
  """

  name: str
  phase: str
  calls: float
  moved: float
  flops: float
  outside: float = 0.0
  arguments: float = 0.0
  temporaries: float = 0.0
  compiles: bool = True
  collectives: tuple[hlo.Collective, ...] = ()

  @property
  def needed(self) -> float:
    """Bytes of memory while it runs."""
    return self.arguments + self.temporaries + self.outside

  def fits(self, memory: float) -> bool:
    """True if it compiles and fits into the usable bytes of a chip."""
    return self.compiles and self.needed <= memory

  def sent(self, network: str) -> float:
    """Bytes that a chip sends by 'ici' or 'dcn'."""
    return sum(x.sent for x in self.collectives if x.network == network)


def costs(
  run: programs.Run,
  memory: float,
  slices: int = 1,
  *,
  note: Callable[[str], None] = lambda text: None,
  until_full: bool = False,
) -> list[Cost]:
  """Compile every program of a run.

  Args:
    run: the programs.
    memory: usable bytes of a chip.
    slices: number of slices that the mesh spans.
    note: function that gets a line for each program.
    until_full: True to stop at the first program that does not fit.
  """
  outside = {part: programs.per_chip(x) for part, x in run.parts().items()}
  listed = list(run.programs())
  # The largest programs first, where one refusal is enough.
  if until_full:
    rank = ('update', 'rollout', 'score').index
    order = sorted(listed, key=lambda x: (rank(x.phase), x.calls > 0))
  else:
    order = listed
  measured = {}
  for program in order:
    begin = time.perf_counter()
    beside = sum(outside[name] for name in program.beside)
    with jax.set_mesh(run.mesh):
      cost = _cost(program, run.mesh.size, slices, beside)
    measured[program.name] = cost
    note(f'{cost.name}: {time.perf_counter() - begin:.0f} s')
    gc.collect()
    if until_full and not cost.fits(memory):
      break
  names = [program.name for program in listed]
  return [measured[name] for name in names if name in measured]


def _cost(
  program: programs.Program, chips: int, slices: int, outside: float
) -> Cost:
  traced = program.trace()
  cost = Cost(
    program.name,
    program.phase,
    program.calls,
    program.moved,
    flops(traced.jaxpr, trips=program.trips) / chips,
    outside,
  )
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    refusal = refused(str(error))
    if refusal is None:
      raise
    return dataclasses.replace(cost, temporaries=refusal[0], compiles=False)
  plan = compiled.memory_analysis()
  collectives = hlo.collectives(
    hlo.parse(compiled.as_text()),
    chips // slices,
    slices,
    data_trips=program.trips,
  )
  return dataclasses.replace(
    cost,
    arguments=float(plan.argument_size_in_bytes),
    temporaries=float(
      plan.temp_size_in_bytes
      + plan.output_size_in_bytes
      - plan.alias_size_in_bytes
      + plan.generated_code_size_in_bytes
    ),
    collectives=tuple(collectives),
  )
