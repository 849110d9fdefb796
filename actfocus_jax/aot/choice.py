"""Which mesh: the least split one that fits, by formula and then by compiling.

Every mesh of the slice's chips is a candidate whose rows the batches divide
and whose weights the model divides. Micro-batches grow to the number of row
shards where the config's are smaller. Least split means: no tensor axis if
possible, then the smallest fsdp axis, for what is not split need not be
gathered. Several slices are joined along `data`.
"""

import copy
import dataclasses
from collections.abc import Iterator

import ml_collections

from actfocus_jax import dry_run
from actfocus_jax.aot import topology
from actfocus_jax.model import architecture
from actfocus_jax.run import checks, settings

# The formula leaves out what a compiler adds, and overstates what it saves.
_SLACK = 1.25


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A mesh, and the config that runs on it.

  Attributes:
    c: The config with mesh and micro-batch set.
    by_formula: Bytes of a chip, from `memory.per_device`.
  """

  c: ml_collections.ConfigDict
  by_formula: float

  @property
  def axes(self) -> dict[str, int]:
    """The sizes of the mesh axes."""
    return {name: self.c.mesh[name] for name in ('data', 'fsdp', 'tensor')}


def candidates(
  c: ml_collections.ConfigDict,
  config: architecture.Config,
  where: topology.Topology,
) -> list[Candidate]:
  """All meshes that can run the config, the least split first."""
  found = []
  for axes in _meshes(where):
    adapted = _adapted(c, config, axes)
    if adapted is not None:
      found.append(Candidate(adapted, dry_run.needs(adapted, config)['total']))
  return found


def given(
  c: ml_collections.ConfigDict,
  config: architecture.Config,
  where: topology.Topology,
) -> Candidate:
  """The mesh that the config names, on the chips of a slice.

  Raises:
    Refused: One sentence.
  """
  c = copy.deepcopy(c)
  rest = c.mesh.fsdp * c.mesh.tensor
  data = where.chips // rest if c.mesh.data == -1 else c.mesh.data
  if data * rest != where.chips or data < 1:
    raise settings.Refused(
      f'mesh data={c.mesh.data}, fsdp={c.mesh.fsdp}, tensor={c.mesh.tensor} '
      f'does not fit the {where.chips} chips of {where}; allowed: sizes that '
      'multiply to that number, or --mesh=auto.'
    )
  with c.unlocked():
    c.mesh.data = data
  checks.check_mesh(c, data * c.mesh.fsdp)
  return Candidate(c, dry_run.needs(c, config)['total'])


def promising(found: list[Candidate], memory: float) -> list[Candidate]:
  """Those that may fit, in the order in which to try them."""
  fit = [one for one in found if one.by_formula <= memory]
  near = [one for one in found if memory < one.by_formula <= _SLACK * memory]
  return fit + sorted(near, key=lambda one: one.by_formula)


def _meshes(where: topology.Topology) -> Iterator[tuple[int, int, int]]:
  chips = where.chips
  for tensor in _divisors(chips):
    for fsdp in _divisors(where.slice_chips):
      if chips % (tensor * fsdp) == 0:
        data = chips // (tensor * fsdp)
        if data % where.slices == 0:
          yield data, fsdp, tensor


def _divisors(n: int) -> list[int]:
  return [k for k in range(1, n + 1) if n % k == 0]


def _adapted(
  c: ml_collections.ConfigDict,
  config: architecture.Config,
  axes: tuple[int, int, int],
) -> ml_collections.ConfigDict | None:
  """The config on a mesh; None if that cannot run it."""
  data, fsdp, tensor = axes
  shards = data * fsdp
  heads = config.num_heads % tensor or config.num_key_value_heads % tensor
  widths = (config.hidden_size, config.intermediate_size, config.vocab_size)
  uneven = widths[0] % fsdp or widths[1] % tensor or widths[2] % tensor
  if heads or uneven:
    return None
  c = copy.deepcopy(c)
  with c.unlocked():
    c.mesh.update(data=data, fsdp=fsdp, tensor=tensor)
    least = c.learner.microbatch or c.learner.minibatch
    whole = c.learner.minibatch
    sizes = (n for n in _divisors(whole) if n >= least and n % shards == 0)
    c.learner.microbatch = next(sizes, least)
  try:
    checks.check_mesh(c, shards)
  except settings.Refused:
    return None
  return c
