"""From measured programs to an answer: does it fit, how long, at what cost.

The time of a program is the roofline: the longest of compute, memory and
network at their peaks, while the others overlap. It is a lower bound. An answer
is a dict of plain values, as `--json` writes it.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import ml_collections

from actfocus_jax.aot import chips, measure, meshes, programs

PHASES = ('rollout', 'score', 'update')
_GB = 1e9


# --- An answer ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
  """A config on some slices.

  Attributes:
    c: a checked config.
    config: architecture of the model.
    topology: the slices; the peaks of their chip bound the time.
    work: tokens of an episode.
    is_auto: True to choose the mesh, False to take the config's.
    with_fused: True to compile score and update as one program, too.
  """

  c: ml_collections.ConfigDict
  config: Any
  topology: chips.Topology
  work: programs.Workload
  is_auto: bool = True
  with_fused: bool = False


def answer(
  question: Question, *, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
  """Compile the programs of a config, on the first mesh that fits.

  Args:
    question: the config and the slices.
    note: function that gets a line for each program.

  Returns:
    The answer; with the field `refused` if no mesh can run the config.

  Raises:
    UsageError: if libtpu does not know the slices, or if the mesh that the
      config names cannot run it.
  """
  q, topology = question, question.topology
  devices = chips.devices(topology)
  memory = measure.usable(devices[0])
  size = topology.slice_chips, topology.slices
  if q.is_auto:
    plans = meshes.by_rule(q.c, q.config, *size)
    tried = meshes.promising(plans, memory)
    if not tried:
      return _refusal(q, plans, memory)
  else:
    try:
      tried = [meshes.of_config(q.c, q.config, *size)]
    except ValueError as error:
      raise chips.UsageError(f'On {topology}: {error}') from error
  for plan in tried:
    note(f'mesh {plan.shape}')
    run = programs.Run(
      plan.c, q.config, plan.c.mesh, devices, q.work, with_fused=q.with_fused
    )
    costs = measure.costs(run, memory, note=note, until_full=len(tried) > 1)
    gc.collect()
    jax.clear_caches()
    if all(cost.fits for cost in costs):
      break
  return summary(q, plan, run, costs, memory)


def _refusal(q: Question, plans, memory: float) -> dict[str, Any]:
  why = (
    f'no mesh of {q.topology.chips} chips divides '
    f'{q.c.rollout.prompts * q.c.rollout.members} episodes, mini-batches of '
    f'{q.c.learner.minibatch} and the heads of the model'
  )
  if plans:
    least = min(plan.by_formula for plan in plans)
    why = f'does not fit: {least / _GB:.1f} of {memory / _GB:.1f} GB by formula'
  return {'topology': str(q.topology), 'fits': False, 'refused': why}


def summary(
  q: Question,
  plan: meshes.Plan,
  run: programs.Run,
  costs: Sequence[measure.Cost],
  memory: float,
) -> dict[str, Any]:
  """Return the answer for measured programs."""
  worst = max(costs, key=lambda cost: cost.needed)
  found = {
    'topology': str(q.topology),
    'chips': q.topology.chips,
    'mesh': dict(run.mesh.shape),
    'microbatch': plan.c.learner.microbatch,
    'workload': dataclasses.asdict(q.work) | {'length': q.work.length},
    'fits': all(cost.fits for cost in costs),
    'memory': {
      'usable': memory,
      'needed': worst.needed,
      'program': worst.name,
      'by_formula': plan.by_formula,
      'parts': {k: measure.per_chip(x) for k, x in run.parts().items()},
    },
    'programs': [timed(cost, q.topology.chip) for cost in costs],
    'kernels': sorted({name for cost in costs for name in cost.kernels}),
    'price': q.topology.chip.price,
    'flags': list(plan.flags),
  }
  if found['fits']:
    found['iteration'] = iteration(
      found['programs'], run.episodes * q.work.sampled, q.topology
    )
  return found


def timed(cost: measure.Cost, chip: chips.Chip) -> dict[str, Any]:
  """A cost with the seconds of the roofline and what binds them."""
  times = {
    'compute': cost.flops / chip.flops,
    'memory': cost.read_written / chip.hbm_bandwidth,
    'ici': cost.ici / chip.ici_bandwidth,
    'dcn': cost.dcn / chip.dcn_bandwidth,
  }
  return dataclasses.asdict(cost) | {
    'ici': cost.ici,
    'dcn': cost.dcn,
    'times': times,
    'call_seconds': max(times.values()),
    'bound': max(times, key=times.get),
  }


def iteration(
  timed_programs: list[dict[str, Any]], tokens: int, topology: chips.Topology
) -> dict[str, Any]:
  """Add up the programs of an iteration, which follow one another."""
  seconds, bounds = dict.fromkeys(PHASES, 0.0), {}
  for phase in PHASES:
    programs = [x for x in timed_programs if x['phase'] == phase]
    spent = [x['calls'] * x['call_seconds'] for x in programs]
    seconds[phase] = sum(spent)
    bounds[phase] = programs[spent.index(max(spent))]['bound']
  whole = sum(seconds.values())
  dollars = whole / 3600 * topology.chips * topology.chip.price
  return {
    'seconds': seconds | {'all': whole},
    'bounds': bounds,
    'flops': sum(x['calls'] * x['flops'] for x in timed_programs),
    'calls': sum(x['calls'] for x in timed_programs),
    'tokens': tokens,
    'tokens_per_second': tokens / whole,
    'dollars': dollars,
    'dollars_per_million': dollars / tokens * 1e6,
  }


def smallest(
  topologies: Iterable[chips.Topology],
  answer_of: Callable[[chips.Topology], dict[str, Any]],
) -> dict[str, Any]:
  """Return the answer for the first topology that fits, or for the last one."""
  for topology in topologies:
    found = answer_of(topology)
    if found['fits']:
      break
  return found


# --- Scaling -----------------------------------------------------------------

# (name, kind, chips, whether the batch grows with the chips)
LINES = (
  ("v5p, the paper's batch", 'v5p', (1, 4, 16, 64, 256, 1024), False),
  ('v5p, batch grows', 'v5p', (8, 64, 512, 4096), True),
  ('v5e, batch grows', 'v5e', (1, 16, 256, 512, 4096), True),
)


def growing(count: int) -> dict[str, int]:
  """Fields of a batch with 16 episodes and 4 trained rows on every chip."""
  prompts = max(8, count)
  return {
    'rollout.prompts': prompts,
    'rollout.slots': 16 * prompts,
    'learner.minibatch': 4 * prompts,
    'eval.prompts': max(32, prompts),
  }


# --- Text --------------------------------------------------------------------


def describe(found: dict[str, Any]) -> str:
  """An answer as text for people."""
  memory = found['memory']
  mesh = ', '.join(f'{name}={size}' for name, size in found['mesh'].items())
  lines = [
    f'{found["config"]} on {found["topology"]}: chips {found["chips"]}, mesh '
    f'{mesh}, micro-batches of {found["microbatch"]}',
    '',
    f'Memory of a chip, GB ({memory["usable"] / _GB:.2f} usable):',
  ]
  parts = memory['parts'].items()
  lines += [f'  {part:<16} {x / _GB:8.2f}' for part, x in parts if x]
  lines += ['', *_programs(found['programs'])]
  lines += [
    '',
    f'{"Fits" if found["fits"] else "Does not fit"}: the largest program, '
    f"'{memory['program']}', needs {memory['needed'] / _GB:.2f} of "
    f'{memory["usable"] / _GB:.2f} GB; by formula '
    f'{memory["by_formula"] / _GB:.2f}.',
    '',
    'Collectives of a call: kind, mesh axes, number, GB that a chip sends',
    *_collectives(found['programs']),
    f'Kernels in the programs: {", ".join(found["kernels"]) or "none"}',
  ]
  if 'iteration' in found:
    lines += ['', assumptions(found), _iteration(found['iteration'])]
    flags = ' '.join(found['flags'])
    lines += ['', f'To train what was counted: {flags}'] if flags else []
  return '\n'.join(lines)


def _programs(found: list[dict[str, Any]]) -> list[str]:
  lines = [
    f'{"program":<32} {"calls":>6} {"GB":>7} {"TFLOP":>8} {"GB moved":>9} '
    f'{"GB sent":>8} {"ms":>8}  bound'
  ]
  for x in found:
    lines.append(
      f'{x["name"]:<32} {x["calls"]:6.0f} {x["needed"] / _GB:7.2f} '
      f'{x["flops"] / 1e12:8.3f} {x["read_written"] / _GB:9.3f} '
      f'{(x["ici"] + x["dcn"]) / _GB:8.3f} {x["call_seconds"] * 1e3:8.2f}  '
      + (x['bound'] if x['compiles'] else 'does not compile: memory')
    )
  return [
    *lines,
    'GB: memory while it runs. TFLOP, GB moved, GB sent and ms at least: one '
    'chip, one call.',
    'view N: positions of the cache that are read. length N: tokens of a row.',
  ]


def _collectives(found: list[dict[str, Any]]) -> list[str]:
  lines = []
  for x in found:
    for c in x['collectives']:
      if c['ici'] + c['dcn'] >= 1e6:
        away = ' (to other slices)' if c['dcn'] > c['ici'] else ''
        lines.append(
          f'  {x["name"]:<32} {c["kind"]:<19} {c["axes"]:<14} '
          f'{c["count"]:8.0f} {(c["ici"] + c["dcn"]) / _GB:9.3f}{away}'
        )
  return lines or ['  none above 1 MB']


def assumptions(found: dict[str, Any]) -> str:
  """The assumptions behind the times of an answer."""
  work = found['workload']
  reached = [f'{share:.0%}' for share in found['reached']]
  kind = 'the longest that the config allows' if work['is_most'] else 'as given'
  return (
    f'Assumed: episodes {kind}, a prompt of {work["prompt_tokens"]} tokens, '
    f'{work["turns"]} turns of {work["response_tokens"]} sampled tokens, '
    f'observations of {work["observation_tokens"]} tokens, {work["length"]} of '
    f'{work["context"]} tokens in all; {", ".join(reached)} of the peaks of '
    f'compute, memory and network; ${found["price"]:.2f} a chip and hour.'
  )


def _iteration(found: dict[str, Any]) -> str:
  seconds = found['seconds']
  parts = ', '.join(f'{phase} {seconds[phase]:.3g}' for phase in PHASES)
  return (
    f'An iteration takes at least {seconds["all"]:.3g} s ({parts}). '
    f'{found["calls"]:.0f} calls, {found["tokens"]:,} sampled tokens, at most '
    f'{found["tokens_per_second"]:,.0f} a second, at least '
    f'${found["dollars"]:.3g}.'
  )


HEAD = (
  '| config | chips | slice | mesh | GB of a chip | decided by | rollout, '
  'score, update: s at least | bound by | tokens/s at most | $ at least | '
  '$ a million tokens |\n' + '|---' * 11 + '|'
)


def row(config: str, found: dict[str, Any]) -> str:
  """An answer as a row below HEAD."""
  count = found.get('chips', '')
  start = f'| {config} | {count} | {found["topology"]} |'
  if 'refused' in found:
    return f'{start} {found["refused"]} |' + ' |' * 7
  memory = found['memory']
  mesh = ' x '.join(f'{k} {n}' for k, n in found['mesh'].items() if n > 1)
  needed = f'{memory["needed"] / _GB:.1f} of {memory["usable"] / _GB:.1f}'
  start += f' {mesh or "one chip"} | {needed} | {memory["program"]} |'
  if not found['fits']:
    return f'{start} does not fit |' + ' |' * 4
  x = found['iteration']
  seconds = ', '.join(f'{x["seconds"][phase]:.2f}' for phase in PHASES)
  return (
    f'{start} {seconds} | {", ".join(x["bounds"].values())} | '
    f'{x["tokens_per_second"]:,.0f} | {x["dollars"]:.3f} | '
    f'{x["dollars_per_million"]:.2f} |'
  )
