"""From one chip to thousands: a bound on speed and cost of a training run.

Two ways to use more chips. *The paper's batch* is cut finer and finer, until
there is no row left to cut. *A batch that grows* keeps 16 episodes and 4
trained rows on every chip. Every point is compiled, so what it sends between
chips and slices is what the program sends; what the host does between calls is
an assumption, `EnvPool`.
"""

import dataclasses
import json
from typing import Any

from actfocus_jax.aot import many, table, topology
from actfocus_jax.config import schema

SIZE, ALGO = '3b', 'ppo'
_MEMBERS = 16  # The paper's, of a group.
MOST_IN_SLICE = {'v5e': 256, 'v6e': 256, 'v5p': 4096}


@dataclasses.dataclass(frozen=True)
class EnvPool:
  """Seconds on the host, of which none overlap with the device's.

  The first is an assumption. The others are what `tests/bench/host_cost.py`
  measured with Qwen2.5's tokenizer, Sokoban and responses of 400 tokens on a
  core of an AMD EPYC (Zen 5). Hosts play in parallel what is theirs, but each
  follows all episodes.

  Attributes:
    call: Of a call to the device, until its result is there.
    own_turn: Of a turn: reading, playing and rendering it.
    turn: Of a turn of anybody: hearing it, and following what became of it.
    slot: Of any episode's slot in a call to decode; all have one.
    opening: Of any board: rendering the first prompt.
    episode: Of any episode: laying it out in the batch.
  """

  call: float = 2e-3
  own_turn: float = 0.19e-3
  turn: float = 25e-6
  slot: float = 0.13e-6
  opening: float = 0.72e-3
  episode: float = 0.1e-3

  def seconds(self, told: dict[str, Any], prompts: int, members: int) -> float:
    """Of an iteration with so many boards and members of a group."""
    decoding = sum(
      one['calls']
      for one in told['programs']
      if one['name'].startswith('decode,')
    )
    episodes, turns = prompts * members, told['workload']['turns']
    followed = decoding * self.slot + turns * self.turn + self.episode
    own = episodes / told['hosts'] * turns * self.own_turn
    called = told['iteration']['calls'] * self.call
    return called + own + episodes * followed + prompts * self.opening

  def assumptions(self) -> str:
    """What is added for it, in a sentence."""
    return (
      f'The host adds {self.call * 1e3:g} ms a call to the device, an '
      f'assumption, and what was measured of it: {self.own_turn * 1e3:g} ms a '
      f'turn, which hosts share, {self.turn * 1e6:g} µs to follow one, '
      f'{self.slot * 1e6:g} µs a slot in a call to decode, '
      f'{self.episode * 1e3:g} ms an episode and {self.opening * 1e3:g} ms a '
      'board, which every host does for all.'
    )


@dataclasses.dataclass(frozen=True)
class Line:
  """One curve.

  Attributes:
    name: In the legend.
    kind: Of chips.
    counts: Of chips.
    grows: Whether the batch grows with them.
  """

  name: str
  kind: str
  counts: tuple[int, ...]
  grows: bool


LINES = (
  Line("v5p, the paper's batch", 'v5p', (1, 4, 16, 64, 256, 1024), False),
  Line('v5p, batch grows', 'v5p', (8, 64, 512, 4096), True),
  Line('v5e, batch grows', 'v5e', (1, 16, 256, 512, 4096), True),
)


def run(asks: many.Asks, host: EnvPool | None = None) -> str:
  """Compiles every point; writes scale.json, scale.md and scale.png.

  Args:
    asks: How to ask.
    host: What the host takes.

  Returns:
    The table as Markdown.
  """
  host = host or EnvPool()
  every = [(line, count) for line in LINES for count in line.counts]
  asked = [_cell(line, count) for line, count in every]
  known = [cell for cell in asked if cell]
  told = dict(zip(known, asks.answers([[x] for x in known]), strict=True))
  points = [
    _point(line, count, cell, told.get(cell), host)
    for (line, count), cell in zip(every, asked, strict=True)
  ]
  (asks.out / 'scale.json').write_text(json.dumps(points, indent=1))
  assumed = f'{table.assumptions(points)} {host.assumptions()}'
  text = f'{markdown(points)}\n\n{assumed}'
  (asks.out / 'scale.md').write_text(f'{text}\n')

  from actfocus_jax.aot import plot

  c, _ = asks.config_of(SIZE, ALGO)
  played = ' and '.join(one.name for one in schema.sections(c))
  title = f'Qwen2.5-{SIZE.upper()}, {ALGO.upper()} on {played}'
  plot.scale(points, asks.out / 'scale.png', title, assumed)
  return text


def _cell(line: Line, count: int) -> many.Cell | None:
  """What is compiled for a point; None if no slice has so many chips."""
  where = slices_of(line.kind, count)
  changes = growing(count) if line.grows else {}
  return where and many.Cell(SIZE, ALGO, where, tuple(changes.items()))


def _point(line: Line, count: int, cell, told, host: EnvPool) -> dict[str, Any]:
  point = {'line': line.name, 'kind': line.kind, 'chips': count}
  if cell is None:
    return point | {'refused': f'{line.kind} has no slice of {count}'}
  if not told['fits']:
    return point | {'refused': told.get('refused', 'does not fit')}
  prompts = dict(cell.changes).get('rollout__prompts', 8)
  return point | summary(told, prompts, host)


def growing(count: int) -> dict[str, int]:
  """A batch in proportion to the chips: 16 episodes and 4 rows on each."""
  prompts = max(8, count)
  return {
    'rollout__prompts': prompts,
    'rollout__slots': _MEMBERS * prompts,
    'learner__minibatch': 4 * prompts,
    'eval__prompts': max(32, prompts),
  }


def slices_of(kind: str, count: int) -> topology.Topology | None:
  """As few slices as hold so many chips; None if none do."""
  each = min(count, MOST_IN_SLICE[kind])
  for where in topology.all_of(kind):
    if where.chips == each:
      return dataclasses.replace(where, slices=count // each)
  return None


def summary(
  told: dict[str, Any], prompts: int, host: EnvPool
) -> dict[str, Any]:
  """A point of a curve."""
  episodes = prompts * _MEMBERS
  iteration = told['iteration']
  seconds = dict(iteration['seconds'])
  del seconds['all']
  seconds['host'] = host.seconds(told, prompts, _MEMBERS)
  whole = sum(seconds.values())
  dollars = whole / 3600 * told['chips'] * told['price']
  kept = ('topology', 'mesh', 'price', 'efficiency', 'assumptions')
  return {name: told[name] for name in kept} | {
    'episodes': episodes,
    'seconds': seconds | {'all': whole},
    'tokens_per_second': iteration['tokens'] / whole,
    'dollars': dollars,
    'dollars_per_million': dollars / iteration['tokens'] * 1e6,
    'bounds': {
      phase: _binds(told, phase) for phase in ('rollout', 'score', 'update')
    },
    'dcn_seconds': sum(
      one['calls'] * one['times']['dcn'] for one in told['programs']
    ),
  }


def _binds(told: dict[str, Any], phase: str) -> str:
  """What binds the dearest program of a phase."""
  own = [one for one in told['programs'] if one['phase'] == phase]
  return max(own, key=lambda one: one['calls'] * one['call_seconds'])['bound']


def markdown(points: list[dict[str, Any]]) -> str:
  """All points, a row each."""
  lines = [
    '| batch | chips | slices | mesh | episodes | rollout, score, update, '
    'host: s | bound by | tokens/s at most | $ an iteration | '
    '$ a million tokens |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  for one in points:
    start = f'| {one["line"]} | {one["chips"]:,} |'
    if 'refused' in one:
      lines.append(f'{start} {one["refused"]} | | | | | | | |')
      continue
    mesh = ' x '.join(f'{k} {n}' for k, n in one['mesh'].items() if n > 1)
    parts = ('rollout', 'score', 'update', 'host')
    seconds = ', '.join(f'{one["seconds"][part]:.2f}' for part in parts)
    lines.append(
      f'{start} {one["topology"]} | {mesh} | {one["episodes"]:,} | {seconds} | '
      f'{", ".join(one["bounds"].values())} | '
      f'{one["tokens_per_second"]:,.0f} | {one["dollars"]:.3f} | '
      f'{one["dollars_per_million"]:.2f} |'
    )
  return '\n'.join(lines)


def efficiency(points: list[dict[str, Any]], line: str) -> dict[int, float]:
  """Speed per chip, as a share of that on the fewest chips of the line."""
  own = [one for one in points if one['line'] == line and 'seconds' in one]
  if not own:
    return {}
  speed = {x['chips']: x['tokens_per_second'] / x['chips'] for x in own}
  first = speed[min(speed)]
  return {count: value / first for count, value in speed.items()}
