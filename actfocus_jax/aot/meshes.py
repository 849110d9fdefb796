"""The mesh of a run on a slice: the config's own, or one by a simple rule.

The rule: `tensor` is the number of key heads or less; `fsdp` is as small as the
memory formula of `--dry_run` allows; `data` is the rest. A larger `tensor` is
used where there are more chips than rows. Micro-batches grow to the number of
row shards, and several slices are joined along `data`.
"""

import copy
import dataclasses

import ml_collections

from actfocus_jax.cli import dry_run
from actfocus_jax.config import schema, validate
from actfocus_jax.model import architecture
from actfocus_jax.parallel import mesh_shapes

# The formula leaves out what a compiler adds, and overstates what it saves.
_SLACK = 1.25


@dataclasses.dataclass(frozen=True)
class Plan:
  """A mesh and the config that runs on it.

  Attributes:
    c: the config with mesh and micro-batch set.
    shape: the mesh.
    by_formula: bytes of a chip by the memory formula.
    flags: flags that change the given config into this one.
  """

  c: ml_collections.ConfigDict
  shape: mesh_shapes.Shape
  by_formula: float
  flags: tuple[str, ...]


def by_rule(
  c: ml_collections.ConfigDict,
  config: architecture.Config,
  slice_chips: int,
  slices: int,
) -> list[Plan]:
  """Return a plan for every mesh that can run a config, the best first.

  Args:
    c: a checked config.
    config: architecture of the model.
    slice_chips: number of chips of a slice.
    slices: number of slices.
  """
  heads = config.num_key_value_heads
  tensors = _divisors(slice_chips)
  tensors.sort(key=lambda n: (n > heads, abs(n - heads)))
  plans = []
  for tensor in tensors:
    for fsdp in _divisors(slice_chips // tensor):
      mesh = {'data': slice_chips // (tensor * fsdp), 'fsdp': fsdp}
      mesh |= {'tensor': tensor, 'dcn_data': slices, 'dcn_fsdp': 1}
      changed = copy.deepcopy(c)
      with changed.unlocked():
        shards = mesh['data'] * fsdp * slices
        changed.learner.microbatch = _microbatch(c, shards)
        changed.mesh.update(mesh)
      try:
        plans.append(of_config(changed, config, slice_chips, slices, given=c))
      except ValueError:  # The mesh leaves something uneven.
        continue
  return plans


def of_config(
  c: ml_collections.ConfigDict,
  config: architecture.Config,
  slice_chips: int,
  slices: int,
  *,
  given: ml_collections.ConfigDict | None = None,
) -> Plan:
  """Return the plan for the mesh that a config names.

  Args:
    c: a checked config.
    config: architecture of the model.
    slice_chips: number of chips of a slice.
    slices: number of slices.
    given: config that the flags start from; None for `c`.

  Raises:
    ValueError: if the mesh does not fit the chips or leaves something uneven.
  """
  splits = mesh_shapes.row_splits(validate.mesh_rows(c)) + config.splits
  shape = mesh_shapes.choose(c.mesh.to_dict(), slice_chips, slices, splits)
  before = schema.flatten(given or c)
  c = copy.deepcopy(c)
  with c.unlocked():
    c.mesh.update(dataclasses.asdict(shape))
    c.learner.fused = False  # Score and update are compiled as two programs.
  flags = tuple(
    f'--config.{field}={value}'
    for field, value in schema.flatten(c).items()
    # An open size, -1, becomes what the others leave.
    if value != before[field] and before[field] != -1
  )
  return Plan(c, shape, dry_run.needs(c, config)['total'], flags)


def promising(plans: list[Plan], memory: float) -> list[Plan]:
  """Return the plans that may fit, in the order in which to compile them."""
  fit = [plan for plan in plans if plan.by_formula <= memory]
  near = [x for x in plans if memory < x.by_formula <= _SLACK * memory]
  return fit + sorted(near, key=lambda plan: plan.by_formula)


def _microbatch(c: ml_collections.ConfigDict, shards: int) -> int:
  """The smallest micro-batch from the config's on that the shards divide."""
  least = c.learner.microbatch or c.learner.minibatch
  sizes = (n for n in _divisors(c.learner.minibatch) if n >= least)
  return next((n for n in sizes if n % shards == 0), least)


def _divisors(n: int) -> list[int]:
  return [k for k in range(1, n + 1) if n % k == 0]
