"""Fit, work and least time of a config on a TPU slice.

A mesh is the config's own or found by a simple rule: `tensor` is the number of
key heads or less; `fsdp` is as small as the memory formula of `--dry_run`
allows; `data` is the rest. A larger `tensor` is used if there are more chips
than rows. Slices are joined along `data`.

The time of a program is the roofline: the longest of compute, memory and
network at their peaks, while the others overlap. It is a lower bound. An answer
is a dict of plain values, as `--json` writes it.
"""

import copy
import dataclasses
import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from actfocus_jax import errors
from actfocus_jax.aot import chips, measure, programs
from actfocus_jax.cli import dry_run
from actfocus_jax.config import schema, validate
from actfocus_jax.model import architecture
from actfocus_jax.parallel import mesh_shapes

PHASES = ('rollout', 'score', 'update')
_GB = 1e9
# The formula leaves out what a compiler adds, and overstates what it saves.
_SLACK = 1.25


# --- Meshes ------------------------------------------------------------------


class Plan(NamedTuple):
  """A mesh, the config that runs on it, and its bytes of a chip by formula."""

  c: ml_collections.ConfigDict
  shape: mesh_shapes.Shape
  by_formula: float


def plans_by_rule(
  c: ml_collections.ConfigDict,
  config: architecture.Config,
  slice_chips: int,
  slices: int,
) -> list[Plan]:
  """Return a plan for every mesh that can run a config, the best first."""
  heads = config.num_key_value_heads
  tensors = _divisors(slice_chips)
  tensors.sort(key=lambda n: (n > heads, abs(n - heads)))
  plans = []
  for tensor in tensors:
    for fsdp in _divisors(slice_chips // tensor):
      data = slice_chips // (tensor * fsdp)
      changed = copy.deepcopy(c)
      with changed.unlocked():
        changed.learner.microbatch = _microbatch(c, data * fsdp * slices)
        changed.mesh.update(
          data=data, fsdp=fsdp, tensor=tensor, dcn_data=slices, dcn_fsdp=1
        )
      try:
        plans.append(plan_of(changed, config, slice_chips, slices))
      except ValueError:  # The mesh leaves something uneven.
        continue
  return plans


def plan_of(
  c: ml_collections.ConfigDict,
  config: architecture.Config,
  slice_chips: int,
  slices: int,
) -> Plan:
  """Return the plan for the mesh that a config names.

  Raises:
    ValueError: if the mesh does not fit the chips or leaves something uneven.
  """
  splits = mesh_shapes.row_splits(validate.mesh_rows(c)) + config.splits
  shape = mesh_shapes.choose(c.mesh.to_dict(), slice_chips, slices, splits)
  c = copy.deepcopy(c)
  with c.unlocked():
    c.mesh.update(dataclasses.asdict(shape))
    c.learner.fused = False  # Score and update are compiled as two programs.
  return Plan(c, shape, dry_run.needs(c, config)['total'])


def promising(plans: list[Plan], memory: float) -> list[Plan]:
  """Return the plans that may fit, in the order in which to compile them."""
  near = [x for x in plans if x.by_formula <= _SLACK * memory]
  return sorted(near, key=lambda plan: max(plan.by_formula, memory))


def changed_flags(
  given: ml_collections.ConfigDict, c: ml_collections.ConfigDict
) -> list[str]:
  """Flags that change one config into the other."""
  before = schema.flatten(given)
  return [
    f'--config.{field}={value}'
    for field, value in schema.flatten(c).items()
    # An open size, -1, becomes what the others leave.
    if value != before[field] and before[field] != -1
  ]


def _microbatch(c: ml_collections.ConfigDict, shards: int) -> int:
  """The smallest micro-batch from the config's on that the shards divide."""
  least = c.learner.microbatch or c.learner.minibatch
  sizes = (n for n in _divisors(c.learner.minibatch) if n >= least)
  return next((n for n in sizes if n % shards == 0), least)


def _divisors(n: int) -> list[int]:
  return [k for k in range(1, n + 1) if n % k == 0]


# --- An answer ---------------------------------------------------------------


def answer(
  c: ml_collections.ConfigDict,
  config: architecture.Config,
  topology: chips.Topology,
  work: programs.Workload,
  *,
  is_auto: bool = True,
  note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
  """Compile the programs of a config, on the first mesh that fits.

  Args:
    c: a checked config.
    config: architecture of the model.
    topology: the slices.
    work: tokens of an episode.
    is_auto: True to choose the mesh, False to take the config's.
    note: function that gets a line for each program.

  Returns:
    The answer; with the field `refused` if no mesh can run the config.

  Raises:
    UsageError: if libtpu does not know the slices, or if the mesh that the
      config names cannot run it.
  """
  devices = chips.devices(topology)
  memory = measure.usable(devices[0])
  size = topology.slice_chips, topology.slices
  if is_auto:
    plans = plans_by_rule(c, config, *size)
    tried = promising(plans, memory)
    if not tried:
      why = _refusal(c, topology, plans, memory)
      return {'topology': str(topology), 'fits': False, 'refused': why}
  else:
    try:
      tried = [plan_of(c, config, *size)]
    except ValueError as error:
      raise errors.UsageError(f'On {topology}: {error}') from error
  for plan in tried:
    note(f'mesh {plan.shape}')
    run = programs.Run(plan.c, config, plan.c.mesh, devices, work)
    costs = measure.costs(
      run, memory, topology.slices, note=note, until_full=len(tried) > 1
    )
    gc.collect()
    jax.clear_caches()
    if all(cost.fits(memory) for cost in costs):
      break
  worst = max(costs, key=lambda cost: cost.needed)
  result = {
    'topology': str(topology),
    'chips': topology.chips,
    'mesh': dict(run.mesh.shape),
    'microbatch': plan.c.learner.microbatch,
    'workload': dataclasses.asdict(work) | {'length': work.length},
    'fits': all(cost.fits(memory) for cost in costs),
    'memory': {
      'usable': memory,
      'needed': worst.needed,
      'program': worst.name,
      'by_formula': plan.by_formula,
      'parts': {k: programs.per_chip(x) for k, x in run.parts().items()},
    },
    'programs': [timed(cost, chips.CHIPS[topology.kind]) for cost in costs],
    'flags': changed_flags(c, plan.c),
  }
  if result['fits']:
    tokens = run.episodes * work.sampled
    result['iteration'] = iteration(result['programs'], tokens)
  return result


def _refusal(
  c: ml_collections.ConfigDict,
  topology: chips.Topology,
  plans: list[Plan],
  memory: float,
) -> str:
  if plans:
    least = min(plan.by_formula for plan in plans)
    return (
      f'does not fit: {least / _GB:.1f} of {memory / _GB:.1f} GB by formula'
    )
  return (
    f'no mesh of {topology.chips} chips divides '
    f'{c.rollout.prompts * c.rollout.members} episodes, mini-batches of '
    f'{c.learner.minibatch} and the heads of the model'
  )


def timed(cost: measure.Cost, chip: chips.Chip) -> dict[str, Any]:
  """Return a cost with the seconds of the roofline and what binds them."""
  times = {
    'compute': cost.flops / chip.flops,
    'memory': cost.moved / chip.hbm_bandwidth,
    'ici': cost.sent('ici') / chip.ici_bandwidth,
    'dcn': cost.sent('dcn') / chip.dcn_bandwidth,
  }
  return dataclasses.asdict(cost) | {
    'needed': cost.needed,
    'seconds': max(times.values()),
    'bound': max(times, key=times.get),
  }


def iteration(
  timed_programs: Sequence[dict[str, Any]], tokens: int
) -> dict[str, Any]:
  """Add up the programs of an iteration, which follow one another."""
  seconds, bounds = {}, {}
  for phase in PHASES:
    spent = [
      (x['calls'] * x['seconds'], x['bound'])
      for x in timed_programs
      if x['phase'] == phase
    ]
    seconds[phase] = sum(time for time, _ in spent)
    bounds[phase] = max(spent)[1]
  whole = sum(seconds.values())
  return {
    'seconds': seconds | {'all': whole},
    'bounds': bounds,
    'flops': sum(x['calls'] * x['flops'] for x in timed_programs),
    'tokens': tokens,
    'tokens_per_second': tokens / whole,
  }


def smallest(
  topologies: Iterable[chips.Topology],
  answer_of: Callable[[chips.Topology], dict[str, Any]],
) -> dict[str, Any]:
  """Return the answer for the first topology that fits, or for the last one."""
  for topology in topologies:
    result = answer_of(topology)
    if result['fits']:
      break
  return result


# --- Scaling -----------------------------------------------------------------

# (name, kind, chips, True if the batch grows with the chips)
LINES = (
  ('v5p, batch of the config', 'v5p', (1, 4, 16, 64, 256, 1024), False),
  ('v5p, batch grows', 'v5p', (8, 64, 512, 4096), True),
  ('v5e, batch grows', 'v5e', (1, 16, 256, 512, 4096), True),
)


def growing(c: ml_collections.ConfigDict, count: int) -> dict[str, int]:
  """Return the fields of a batch with a prompt or more for every chip."""
  times = max(1, -(-count // c.rollout.prompts))
  prompts = times * c.rollout.prompts
  return {
    'rollout.prompts': prompts,
    'rollout.slots': times * c.rollout.slots,
    'learner.minibatch': times * c.learner.minibatch,
    'eval.prompts': max(c.eval.prompts, prompts),
  }


HEAD = (
  '| batch, chips | slice | mesh | GB of a chip | decided by | rollout, score, '
  'update: s at least | bound by | tokens/s at most |\n' + '|---' * 8 + '|'
)


def row(name: str, found: dict[str, Any]) -> str:
  """Return an answer as a row below HEAD."""
  start = f'| {name} | {found["topology"]} |'
  if 'refused' in found:
    return f'{start} {found["refused"]} |' + ' |' * 5
  memory = found['memory']
  mesh = ' x '.join(f'{k} {n}' for k, n in found['mesh'].items() if n > 1)
  needed = f'{memory["needed"] / _GB:.1f} of {memory["usable"] / _GB:.1f}'
  start += f' {mesh or "one chip"} | {needed} | {memory["program"]} |'
  if not found['fits']:
    return f'{start} does not fit |' + ' |' * 2
  x = found['iteration']
  seconds = ', '.join(f'{x["seconds"][phase]:.2f}' for phase in PHASES)
  bounds = ', '.join(x['bounds'].values())
  return f'{start} {seconds} | {bounds} | {x["tokens_per_second"]:,.0f} |'


# --- Text --------------------------------------------------------------------


def describe(found: dict[str, Any]) -> str:
  """Return an answer as text for people."""
  if 'refused' in found:
    return f'{found["config"]} on {found["topology"]}: {found["refused"]}.'
  memory = found['memory']
  mesh = ', '.join(f'{name}={size}' for name, size in found['mesh'].items())
  parts = memory['parts'].items()
  lines = [
    f'{found["config"]} on {found["topology"]}: chips {found["chips"]}, mesh '
    f'{mesh}, micro-batches of {found["microbatch"]}',
    '',
    f'Memory of a chip, GB ({memory["usable"] / _GB:.2f} usable):',
    *(f'  {part:<16} {x / _GB:8.2f}' for part, x in parts if x),
    '',
    f'{"program":<32} {"calls":>6} {"GB":>7} {"TFLOP":>8} {"ms":>8}  bound',
  ]
  for x in found['programs']:
    bound = x['bound'] if x['compiles'] else 'does not compile: memory'
    lines.append(
      f'{x["name"]:<32} {x["calls"]:6.0f} {x["needed"] / _GB:7.2f} '
      f'{x["flops"] / 1e12:8.3f} {x["seconds"] * 1e3:8.2f}  {bound}'
    )
  lines += [
    'GB: memory while it runs. TFLOP, and ms at least: one chip, one call.',
    'view N: positions of the cache that are read. length N: tokens of a row.',
    '',
    f'{"Fits" if found["fits"] else "Does not fit"}: the largest program, '
    f"'{memory['program']}', needs {memory['needed'] / _GB:.2f} of "
    f'{memory["usable"] / _GB:.2f} GB; by formula '
    f'{memory["by_formula"] / _GB:.2f}.',
    '',
    'Collectives of a call: kind, network, number, GB that a chip sends',
    *_collectives(found['programs']),
  ]
  if 'iteration' in found:
    lines += ['', _assumptions(found['workload'])]
    lines += [_iteration(found['iteration'])]
    lines += ['', f'To train what was counted: {" ".join(found["flags"])}']
  return '\n'.join(lines)


def _collectives(timed_programs: Sequence[dict[str, Any]]) -> list[str]:
  lines = [
    f'  {x["name"]:<32} {c["kind"]:<19} {c["network"]:<4} {c["count"]:8.0f} '
    f'{c["sent"] / _GB:9.3f}'
    for x in timed_programs
    for c in x['collectives']
    if c['sent'] >= 1e6
  ]
  return lines or ['  none above 1 MB']


def _assumptions(work: dict[str, Any]) -> str:
  kind = 'the longest that the config allows' if work['is_most'] else 'as given'
  return (
    f'Assumed: episodes {kind}, a prompt of {work["prompt_tokens"]} tokens, '
    f'{work["turns"]} turns of {work["response_tokens"]} sampled tokens, '
    f'observations of {work["observation_tokens"]} tokens, {work["length"]} of '
    f'{work["context"]} tokens in all.'
  )


def _iteration(found: dict[str, Any]) -> str:
  seconds = found['seconds']
  parts = ', '.join(f'{phase} {seconds[phase]:.3g}' for phase in PHASES)
  return (
    f'An iteration takes at least {seconds["all"]:.3g} s ({parts}): '
    f'{found["flops"] / 1e12:.3g} TFLOP of a chip, {found["tokens"]:,} sampled '
    f'tokens, at most {found["tokens_per_second"]:,.0f} a second.'
  )
