"""Which mesh: the fastest one that fits, by formula and then by compiling.

Every mesh of the slice's chips is a candidate that cuts batches and model into
equal parts. Micro-batches grow to the number of row shards where the config's
are smaller. Of meshes that are equally fast the least split one is first.
Several slices are joined along `data`.
"""

import copy
import dataclasses
from collections.abc import Iterator

import ml_collections

from actfocus_jax import errors
from actfocus_jax.aot import ranking, topology, workload
from actfocus_jax.cli import dry_run
from actfocus_jax.config import schema, validate
from actfocus_jax.model import architecture
from actfocus_jax.parallel import mesh_shapes

# The formula leaves out what a compiler adds, and overstates what it saves.
_SLACK = 1.25


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A mesh, and the config that runs on it.

  Attributes:
    c: The config with mesh and micro-batch set.
    shape: The mesh.
    by_formula: Bytes of a chip, from `memory.per_device`.
    seconds: Of an iteration, from `ranking.seconds`.
  """

  c: ml_collections.ConfigDict
  shape: mesh_shapes.Shape
  by_formula: float
  seconds: float

  def flags(self, given: ml_collections.ConfigDict) -> list[str]:
    """What to add to the command of a config for it to run like this."""
    before = schema.flatten(given)
    return [
      f'--config.{field}={value}'
      for field, value in schema.flatten(self.c).items()
      # An open size, -1, becomes what the others leave.
      if value != before[field] and before[field] != -1
    ]


def candidates(
  c: ml_collections.ConfigDict,
  config: architecture.Config,
  where: topology.Topology,
  work: workload.Workload,
) -> list[Candidate]:
  """All meshes that can run the config, the fastest first."""
  found = (_adapted(c, config, shape, where, work) for shape in _meshes(where))
  able = [one for one in found if one is not None]
  return sorted(able, key=lambda one: one.seconds)


def given(
  c: ml_collections.ConfigDict,
  config: architecture.Config,
  where: topology.Topology,
  work: workload.Workload,
) -> Candidate:
  """The mesh that the config names, on the chips of a slice.

  Raises:
    UsageError: One sentence.
  """
  try:
    return _candidate(copy.deepcopy(c), config, c.mesh.to_dict(), where, work)
  except ValueError as error:
    raise errors.UsageError(f'On {where}: {error}') from error


def promising(found: list[Candidate], memory: float) -> list[Candidate]:
  """Those that may fit, in the order in which to try them."""
  fit = [one for one in found if one.by_formula <= memory]
  near = [one for one in found if memory < one.by_formula <= _SLACK * memory]
  return fit + sorted(near, key=lambda one: one.by_formula)


def _meshes(where: topology.Topology) -> Iterator[mesh_shapes.Shape]:
  """The least split first."""
  chips = where.slice_chips
  for tensor in _divisors(chips):
    for fsdp in _divisors(chips // tensor):
      data = chips // (tensor * fsdp)
      yield mesh_shapes.Shape(data, fsdp, tensor, dcn_data=where.slices)


def _divisors(n: int) -> list[int]:
  return [k for k in range(1, n + 1) if n % k == 0]


def _adapted(
  c: ml_collections.ConfigDict,
  config: architecture.Config,
  shape: mesh_shapes.Shape,
  where: topology.Topology,
  work: workload.Workload,
) -> Candidate | None:
  """The config on a mesh; None if that cannot run it."""
  c = copy.deepcopy(c)
  shards = shape.total['data'] * shape.total['fsdp']
  least = c.learner.microbatch or c.learner.minibatch
  sizes = (n for n in _divisors(c.learner.minibatch) if n >= least)
  with c.unlocked():
    fitting = (n for n in sizes if n % shards == 0)
    c.learner.microbatch = next(fitting, least)
  try:
    return _candidate(c, config, dataclasses.asdict(shape), where, work)
  except ValueError:
    return None


def _candidate(
  c, config, sizes: dict[str, int], where, work: workload.Workload
) -> Candidate:
  """A candidate of which every size is known.

  Raises:
    ValueError: When the mesh leaves something uneven.
  """
  splits = mesh_shapes.row_splits(validate.mesh_rows(c))
  splits += config.splits
  shape = mesh_shapes.choose(sizes, where.slice_chips, where.slices, splits)
  with c.unlocked():
    c.mesh.update(dataclasses.asdict(shape))
    # Score and update are compiled, and so counted, as two programs.
    c.learner.fused = False
  return Candidate(
    c,
    shape,
    dry_run.needs(c, config)['total'],
    ranking.seconds(c, config, shape, where, work),
  )
