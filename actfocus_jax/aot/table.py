"""What `estimate.report` found, as text for people and as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from actfocus_jax.aot import chips

_GB = 1e9


def describe(told: dict[str, Any]) -> str:
  """One config on one topology, in full."""
  memory = told['memory']
  mesh = ', '.join(f'{name}={size}' for name, size in told['mesh'].items())
  lines = [
    f'{told["config"]} on {told["topology"]}: {_count(told["chips"], "chip")}, '
    f'{_count(told["hosts"], "host")}; mesh {mesh}, micro-batches of '
    f'{told["microbatch"]}',
    '',
    f'Memory of a chip, GB ({memory["usable"] / _GB:.2f} usable):',
  ]
  for part, size in memory['parts'].items():
    if size:
      lines.append(f'  {part:<16} {size / _GB:8.2f}')
  lines += ['', *_programs(told), '', _verdict(told)]
  lines += ['', *_collectives(told)]
  if 'iteration' in told:
    lines += ['', assumptions([told]), _iteration(told)]
    if told['flags']:
      lines += ['', f'To train what was counted: {" ".join(told["flags"])}']
  return '\n'.join(lines)


def _count(number: int, what: str) -> str:
  return f'{number} {what}' if number == 1 else f'{number} {what}s'


def assumptions(told: Iterable[dict[str, Any]]) -> str:
  """What the figures of some answers take for granted, in a paragraph."""
  known = [one for one in told if 'price' in one]
  if not known:
    return 'Nothing is assumed: nothing was compiled.'
  episodes = ' '.join(dict.fromkeys(one['assumptions'] for one in known))
  reached = ', '.join(
    f'{share:.0%} of {peak}' for peak, share in known[0]['efficiency'].items()
  )
  prices = {one['topology'].split(':')[0].split()[-1]: one for one in known}
  named = ', '.join(f'{k} ${one["price"]:.2f}' for k, one in prices.items())
  return (
    f'Assumed: {episodes} Of the peaks of the data sheets {reached} are '
    'reached, and the slowest of these hides the others. A group of chips uses '
    'the links along which its members differ, both ways round only where the '
    'slice closes a ring; collectives follow one another; a hop takes '
    f'{chips.HOP * 1e6:.0f} µs. Score and update are two programs '
    '(learner.fused=False), and the reference scores all sampled tokens. '
    f'Prices per chip and hour: {named}.'
  )


def _programs(told: dict[str, Any]) -> list[str]:
  head = (
    f'{"program":<32} {"calls":>6} {"GB":>7} {"TFLOP":>8} {"GB moved":>9} '
    f'{"GB sent":>8} {"ms":>8} {"ms*":>8}  bound'
  )
  lines = [head]
  for one in told['programs']:
    if not one['flops'] + one['read_written']:
      why = 'does not compile: not enough memory'
    else:
      why = one['bound']
    lines.append(
      f'{one["name"]:<32} {one["calls"]:6.0f} {one["needed"] / _GB:7.2f} '
      f'{one["flops"] / 1e12:8.3f} {one["read_written"] / _GB:9.3f} '
      f'{(one["ici"] + one["dcn"]) / _GB:8.3f} '
      f'{one["call_seconds"] * 1e3:8.2f} {one["compiler_seconds"] * 1e3:8.2f}'
      f'  {why}'
    )
  lines.append(
    'GB: needed with all that is in memory then. TFLOP, GB moved, GB sent and '
    'ms: of one chip in one call, ms as the roofline bounds it;'
  )
  lines.append(
    'ms*: by the cycles that the compiler itself expects, without collectives; '
    'kernels, of which it expects nothing, as their peaks allow.'
  )
  lines.append(
    'view N: slots of which the longest reaches to N of their positions in the '
    'cache; length N: a batch padded to N tokens a row.'
  )
  return lines


def _verdict(told: dict[str, Any]) -> str:
  memory = told['memory']
  does = 'Fits' if told['fits'] else 'Does not fit'
  return (
    f"{does}: the largest program, '{memory['program']}', needs "
    f'{memory["needed"] / _GB:.2f} of {memory["usable"] / _GB:.2f} GB; by '
    f'formula {memory["by_formula"] / _GB:.2f}.'
  )


def _collectives(told: dict[str, Any]) -> list[str]:
  lines = ['Collectives of a call: kind, mesh axes, number, GB a chip sends']
  for one in told['programs']:
    for c in one['collectives']:
      sent = c['ici'] + c['dcn']
      if sent < 1e6:
        continue
      away = ' (to other slices)' if c['dcn'] > c['ici'] else ''
      lines.append(
        f'  {one["name"]:<32} {c["kind"]:<19} {c["axes"]:<14} '
        f'{c["count"]:8.0f} {sent / _GB:9.3f}{away}'
      )
  if len(lines) == 1:
    lines.append('  none above 1 MB')
  kernels = ', '.join(told['kernels']) or 'none'
  return [*lines, f'Kernels in the programs: {kernels}']


def _iteration(told: dict[str, Any]) -> str:
  iteration = told['iteration']
  seconds = iteration['seconds']
  parts = ', '.join(
    f'{name} {value:.3g}' for name, value in seconds.items() if name != 'all'
  )
  return (
    f'An iteration takes at least {seconds["all"]:.3g} s ({parts}); by the '
    f"compiler's cycles {iteration['compiler_seconds']:.3g} s. "
    f'{iteration["calls"]:.0f} calls, {iteration["tokens"]:,} sampled tokens, '
    f'at most {iteration["tokens_per_second"]:,.0f} a second, at least '
    f'${iteration["dollars"]:.3g}.'
  )


def markdown(cells: Sequence[dict[str, Any]]) -> str:
  """Several configs and topologies, a row each."""
  lines = [
    '| model | algorithm | slice | mesh | GB of a chip | decided by | '
    'rollout, score, update: s at least | by cycles, s | tokens/s at most | '
    '$ at least |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  for one in cells:
    lines.append(_row(one))
  return '\n'.join(lines)


def _row(one: dict[str, Any]) -> str:
  start = f'| {one["size"]} | {one["algo"]} | {one["topology"]} |'
  if 'refused' in one:
    return f'{start} {one["refused"]} | | | | | | |'
  memory = one['memory']
  mesh = ' x '.join(
    f'{name} {size}' for name, size in one['mesh'].items() if size > 1
  )
  needed = f'{memory["needed"] / _GB:.1f} of {memory["usable"] / _GB:.1f}'
  first = f'{start} {mesh or "one chip"} | {needed} | {memory["program"]} |'
  if not one['fits']:
    return f'{first} does not fit | | | |'
  iteration = one['iteration']
  seconds = iteration['seconds']
  phases = ', '.join(
    f'{seconds[name]:.1f}' for name in ('rollout', 'score', 'update')
  )
  return (
    f'{first} {phases} | {iteration["compiler_seconds"]:.1f} | '
    f'{iteration["tokens_per_second"]:,.0f} | {iteration["dollars"]:.3f} |'
  )
