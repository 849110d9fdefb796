"""Compile a program and measure it: FLOPs, memory, bytes moved and sent.

1. The program is traced, and its matrix products are counted.
2. It is compiled for devices that need not exist.
3. The compiler says how much memory it plans.
4. The text of the compiled program says what it moves and sends (`hlo`).

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
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from actfocus_jax.aot import chips, hlo, programs

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


def per_chip(tree: Any) -> float:
  """Bytes of abstract arrays on one chip, without padding to tiles."""
  return float(
    sum(
      math.prod(x.sharding.shard_shape(x.shape)) * _itemsize(x.dtype)
      for x in jax.tree.leaves(tree)
    )
  )


def _itemsize(dtype: Any) -> int:
  return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


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
    name: as of the program.
    phase: as of the program.
    calls: as of the program.
    flops: FLOPs of matrix products.
    read_written: bytes of main memory that are read and written.
    collectives: collectives by kind and axes.
    kernels: name of a hand-written kernel -> number of its runs.
    arguments: bytes of the arguments.
    temporaries: bytes needed beside them, with the results unless they take
      the place of an argument.
    outside: bytes of the parts that stay in memory while it runs.
    needed: sum of the three, or the bytes of a refusal.
    compiles: False if the compiler refused for lack of memory.
    fits: True if it compiles and `needed` fits into the memory of a chip.
    seconds: seconds that the compiler took.
  """

  name: str
  phase: str
  calls: float
  flops: float
  read_written: float = 0.0
  collectives: tuple[hlo.Collective, ...] = ()
  kernels: dict[str, float] = dataclasses.field(default_factory=dict)
  arguments: float = 0.0
  temporaries: float = 0.0
  outside: float = 0.0
  needed: float = 0.0
  compiles: bool = True
  fits: bool = True
  seconds: float = 0.0

  @property
  def ici(self) -> float:
    """Bytes that a chip sends within its slice."""
    return sum(x.ici for x in self.collectives)

  @property
  def dcn(self) -> float:
    """Bytes that a chip sends to other slices."""
    return sum(x.dcn for x in self.collectives)


def costs(
  run: programs.Run,
  memory: float,
  *,
  note: Callable[[str], None] = lambda text: None,
  until_full: bool = False,
) -> list[Cost]:
  """Compile every program of a run.

  Args:
    run: the programs.
    memory: usable bytes of a chip.
    note: function that gets a line for each program.
    until_full: True to stop at the first program that does not fit.
  """
  outside = {part: per_chip(tree) for part, tree in run.parts().items()}
  layout = layout_of(run.mesh)
  listed = list(run.programs())
  # The largest programs first, where one refusal is enough.
  order = sorted(listed, key=_rank) if until_full else listed
  measured = {}
  for program in order:
    beside = sum(outside[name] for name in program.beside)
    with jax.set_mesh(run.mesh):
      cost = _cost(program, layout, beside, memory)
    measured[program.name] = cost
    note(f'{cost.name}: {cost.seconds:.0f} s')
    gc.collect()
    if until_full and not cost.fits:
      break
  names = [program.name for program in listed]
  return [measured[name] for name in names if name in measured]


def _rank(program: programs.Program) -> tuple[int, bool]:
  phase = ('update', 'rollout', 'score').index(program.phase)
  return phase, program.calls > 0


def layout_of(mesh: jax.sharding.Mesh) -> hlo.Layout:
  """Mesh axes over all slices, and within the first one."""
  devices = mesh.devices.reshape(-1)
  first = min(map(chips.slice_of, devices))
  inside = [i for i, x in enumerate(devices) if chips.slice_of(x) == first]
  places = np.unravel_index(inside, mesh.devices.shape)
  sizes = [len(set(place.tolist())) for place in places]
  return hlo.Layout(
    dict(mesh.shape), dict(zip(mesh.axis_names, sizes, strict=True))
  )


def _cost(
  program: programs.Program, layout: hlo.Layout, outside: float, memory: float
) -> Cost:
  traced = program.trace()
  count = flops(traced.jaxpr, trips=program.trips) / layout.size
  cost = Cost(
    program.name, program.phase, program.calls, count, outside=outside
  )
  lowered, begin = traced.lower(), time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    refusal = refused(str(error))
    if refusal is None:
      raise
    return dataclasses.replace(
      cost,
      temporaries=refusal[0],
      needed=refusal[0] + outside,
      compiles=False,
      fits=False,
      seconds=time.perf_counter() - begin,
    )
  plan = compiled.memory_analysis()
  temporaries = float(
    plan.temp_size_in_bytes
    + plan.output_size_in_bytes
    - plan.alias_size_in_bytes
    + plan.generated_code_size_in_bytes
  )
  needed = plan.argument_size_in_bytes + temporaries + outside
  text = hlo.parse(compiled.as_text())
  moved = hlo.traffic(text, layout, trips=program.trips)
  return dataclasses.replace(
    cost,
    read_written=moved.read_written,
    collectives=moved.collectives,
    kernels=moved.kernels,
    arguments=float(plan.argument_size_in_bytes),
    temporaries=temporaries,
    needed=needed,
    fits=needed <= memory,
    seconds=time.perf_counter() - begin,
  )
