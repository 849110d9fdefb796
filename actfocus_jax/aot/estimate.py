"""From the costs of programs to an iteration: memory, time, money.

The answer is a plain dict, as it stands in the JSON. Its times are bounds
unless efficiencies say otherwise; what the host does between two calls is not
in them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from actfocus_jax.aot import (
  choice,
  measure,
  programs,
  roofline,
  topology,
  workload,
)

PHASES = ('rollout', 'score', 'update')


def report(
  chosen: choice.Candidate,
  run: programs.Run,
  where: topology.Topology,
  costs: Sequence[measure.Cost],
  *,
  memory: float,
  efficiency: roofline.Efficiency,
  price: float,
) -> dict[str, Any]:
  """Everything that is known of one config on one topology.

  Args:
    chosen: The mesh and its config.
    run: The programs.
    where: The slices.
    costs: Of the programs.
    memory: Usable bytes of a chip.
    efficiency: Shares of the peaks that are reached.
    price: Dollars per chip and hour.

  Returns:
    A dict of plain values.
  """
  worst = max(costs, key=lambda one: one.needed)
  fits = all(one.fits for one in costs)
  told = {
    'topology': str(where),
    'chips': where.chips,
    'hosts': where.pool,
    'mesh': dict(run.mesh.shape),
    'microbatch': chosen.c.learner.microbatch,
    'workload': dataclasses.asdict(run.work) | {'length': run.work.length},
    'fits': fits,
    'memory': {
      'usable': memory,
      'needed': worst.needed,
      'program': worst.name,
      'by_formula': chosen.by_formula,
      'parts': {
        part: measure.per_chip(tree) for part, tree in run.parts.named().items()
      },
    },
    'programs': [_program(one, where, efficiency) for one in costs],
    'kernels': sorted({name for one in costs for name in one.kernels}),
    'efficiency': dataclasses.asdict(efficiency),
    'price': price,
  }
  if fits:
    told['iteration'] = _iteration(told['programs'], run, where, price)
  return told


def _program(
  cost: measure.Cost, where: topology.Topology, efficiency
) -> dict[str, Any]:
  """A cost with its times."""
  chip = where.chip
  times = roofline.times(
    chip,
    flops=cost.flops,
    read_written=cost.read_written,
    ici=cost.load,
    dcn=cost.dcn,
    hops=cost.hops,
    efficiency=efficiency,
  )
  # Of kernels the compiler expects nothing: they count as their peaks allow.
  kernels = max(
    cost.kernel_flops / chip.flops, cost.kernel_bytes / chip.hbm_bandwidth
  )
  return dataclasses.asdict(cost) | {
    'ici': cost.ici,
    'dcn': cost.dcn,
    'times': dataclasses.asdict(times),
    'call_seconds': times.seconds,
    'bound': times.bound,
    'compiler_seconds': cost.cycles / chip.clock + kernels,
  }


def _iteration(
  told: list[dict[str, Any]], run: programs.Run, where, price: float
) -> dict[str, Any]:
  timed = [one for one in told if one['is_timed'] and one['calls']]
  seconds = {
    phase: sum(
      one['calls'] * one['call_seconds']
      for one in timed
      if one['phase'] == phase
    )
    for phase in PHASES
  }
  whole = sum(seconds.values())
  sampled = run.episodes * run.work.sampled
  return {
    'seconds': seconds | {'all': whole},
    'compiler_seconds': sum(
      one['calls'] * max(one['compiler_seconds'], one['call_seconds'])
      for one in timed
    ),
    'flops': sum(one['calls'] * one['flops'] for one in timed),
    'calls': sum(one['calls'] for one in timed),
    'tokens': sampled,
    'tokens_per_second': sampled / whole,
    'dollars': whole / 3600 * where.chips * price,
  }


def assumptions(work: workload.Workload) -> str:
  """What is taken for granted of the rollout, in a sentence."""
  kind = 'the most that the config allows' if work.is_most else 'as given'
  return (
    f'Episodes are {kind}: a prompt of {work.prompt_tokens} tokens, '
    f'{work.turns} turns of {work.response_tokens} sampled tokens, '
    f'{work.observation_tokens} tokens of observation between them, '
    f'{work.length} of {work.context} tokens in all.'
  )
