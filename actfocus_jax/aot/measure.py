"""Compiles the programs of a run, and says what each of them costs a chip.

The life of one program: it is traced, its products are counted; it is lowered
and compiled for devices that need not exist; the compiler says how much memory
it plans; its text says what it moves. A program for which the memory of a chip
does not suffice is no failure but an answer.
"""

import dataclasses
import gc
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from actfocus_jax.aot import (
  collectives,
  flops,
  program_text,
  programs,
  topology,
  traffic,
)

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_SIZE = r'([\d.]+)([KMGT]?)i?B?'
# The two sentences with which the compiler refuses.
_REFUSALS = (
  re.compile(rf'[Uu]sed {_SIZE} of {_SIZE} hbm'),
  re.compile(
    rf'required for [^(]*\({_SIZE}\) exceeds available HBM \({_SIZE}\)'
  ),
)


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one call of a program costs a chip; bytes unless said otherwise.

  Attributes:
    name: As of the program.
    phase: As of the program.
    calls: In one iteration.
    is_timed: As of the program.
    flops: Of matrix products, of one chip.
    read_written: Of main memory.
    copied: Of them, by copies between layouts.
    kernel_flops: Of `flops`, those of hand-written kernels.
    kernel_bytes: Of `read_written`, likewise.
    cycles: The compiler's own estimate, without collectives and kernels.
    collectives: By kind and axes.
    kernels: Hand-written kernels in it, and how often they run.
    arguments: What is given to it.
    temporaries: What it needs beside them, its results included unless they
      take the place of an argument.
    outside: Parts that stay in memory while it runs.
    needed: All of these, or what the compiler asked for in vain.
    fits: Whether the compiler could plan it, and what is outside fits too.
    seconds: That the compiler took.
  """

  name: str
  phase: str
  calls: float
  is_timed: bool
  flops: float
  read_written: float
  copied: float
  kernel_flops: float
  kernel_bytes: float
  cycles: float
  collectives: tuple[collectives.Collective, ...]
  kernels: dict[str, float]
  arguments: float
  temporaries: float
  outside: float
  needed: float
  fits: bool
  seconds: float

  @property
  def ici(self) -> float:
    """Bytes that a chip sends within its slice."""
    return sum(one.ici for one in self.collectives)

  @property
  def load(self) -> float:
    """Bytes that all its links would carry in the time that this takes."""
    return sum(one.load for one in self.collectives)

  @property
  def dcn(self) -> float:
    """Bytes that a chip sends to other slices."""
    return sum(one.dcn for one in self.collectives)

  @property
  def hops(self) -> float:
    """From neighbour to neighbour within its slice, one after the other."""
    return sum(one.hops for one in self.collectives)


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


def usable(devices: Sequence[Any]) -> float:
  """Bytes of main memory that the compiler plans with.

  It tells only when it refuses, so it is asked for what no chip has.
  """
  mesh = jax.sharding.Mesh([devices[0]], ('one',))
  where = NamedSharding(mesh, P())
  huge = jax.ShapeDtypeStruct((2**40,), jnp.float32, sharding=where)
  try:
    jax.jit(lambda x: x + 1).lower(huge).compile()
  except jax.errors.JaxRuntimeError as error:
    found = asked(str(error))
    if found:
      return found[1]
  raise ValueError('The compiler does not say how much memory a chip has.')


def asked(message: str) -> tuple[float, float] | None:
  """(needed, available) of a refusal to compile; None if it is another one."""
  matches = (pattern.search(message) for pattern in _REFUSALS)
  found = next(filter(None, matches), None)
  if not found:
    return None
  needed, unit, available, other = found.groups()
  return float(needed) * _UNITS[unit], float(available) * _UNITS[other]


def all_programs(
  run: programs.Run,
  where: topology.Topology,
  memory: float,
  *,
  note: Callable[[str], None],
  until_full: bool = False,
) -> list[Cost]:
  """Compiles every program of a run.

  Args:
    run: The programs.
    where: The slices.
    memory: Usable bytes of a chip.
    note: Told of each.
    until_full: Whether to stop at the first that does not fit.

  Returns:
    A cost for each.
  """
  outside = {k: per_chip(v) for k, v in run.parts.named().items()}
  layout = collectives.Layout.of(run.mesh, where)
  listed = list(run.programs())
  # What needs the most comes first, where one refusal is enough.
  order = sorted(listed, key=_rank) if until_full else listed
  costs = []
  for program in order:
    beside = sum(outside[name] for name in program.beside)
    with jax.set_mesh(run.mesh):
      costs.append(_one(program, layout, beside, memory))
    note(f'{costs[-1].name}: {costs[-1].seconds:.0f} s')
    gc.collect()
    if until_full and not costs[-1].fits:
      break
  names = [program.name for program in listed]
  return sorted(costs, key=lambda one: names.index(one.name))


def _rank(program: programs.Program) -> tuple[int, bool]:
  phase = ('update', 'rollout', 'score').index(program.phase)
  return phase, program.is_timed


def _one(
  program: programs.Program,
  layout: collectives.Layout,
  outside: float,
  memory: float,
) -> Cost:
  traced = program.trace()
  products, in_kernels = (
    flops.count(traced.jaxpr, trips=program.trips, only_kernels=only)
    / layout.size
    for only in (False, True)
  )
  known = dict(
    name=program.name,
    phase=program.phase,
    calls=program.calls,
    is_timed=program.is_timed,
    flops=products,
    kernel_flops=in_kernels,
    outside=outside,
  )
  return _compiled(known, traced.lower(), layout, program.trips, memory)


def _compiled(
  known: dict[str, Any],
  lowered: Any,
  layout: collectives.Layout,
  trips: float,
  memory: float,
) -> Cost:
  begin, outside = time.perf_counter(), known['outside']
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    refused = asked(str(error))
    if refused is None:
      raise
    seconds = time.perf_counter() - begin
    return Cost(**known, **_nothing(), **_full(refused[0], outside, seconds))
  text = program_text.parse(compiled.as_text())
  moved = traffic.measure(text, layout, trips=trips)
  plan = compiled.memory_analysis()
  arguments = float(plan.argument_size_in_bytes)
  temporaries = float(
    plan.temp_size_in_bytes
    + plan.output_size_in_bytes
    - plan.alias_size_in_bytes
    + plan.generated_code_size_in_bytes
  )
  needed = arguments + temporaries + outside
  return Cost(
    **known,
    read_written=moved.read_written,
    copied=moved.copied,
    kernel_bytes=moved.in_kernels,
    cycles=moved.cycles,
    collectives=moved.collectives,
    kernels=moved.kernels,
    arguments=arguments,
    temporaries=temporaries,
    needed=needed,
    fits=needed <= memory,
    seconds=time.perf_counter() - begin,
  )


def _nothing() -> dict[str, Any]:
  """What is not known of a program that does not compile."""
  return dict(
    read_written=0.0,
    copied=0.0,
    kernel_bytes=0.0,
    cycles=0.0,
    collectives=(),
    kernels={},
  )


def _full(needed: float, outside: float, seconds: float) -> dict[str, Any]:
  return dict(
    arguments=0.0,
    temporaries=needed,
    needed=needed + outside,
    fits=False,
    seconds=seconds,
  )
