"""Compile a run for a TPU slice that is not there: memory, work, least time.

python -m actfocus_jax.aot --config=configs/sokoban.py:size=3b,algo=ppo \
  --topology=v5e:4x4
python -m actfocus_jax.aot --table
python -m actfocus_jax.aot --scale

It needs libtpu, no TPU, and neither weights nor the network:
`pip install "jax[tpu]"` in an environment of its own, because with libtpu
installed other commands look for a TPU.
"""

import copy
import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterable
from typing import Any

import ml_collections
from absl import flags

from actfocus_jax import build, errors
from actfocus_jax.aot import chips
from actfocus_jax.cli import flags as flags_lib
from actfocus_jax.cli import paths
from actfocus_jax.config import presets, schema
from actfocus_jax.model import architecture, files

_TOPOLOGY = flags.DEFINE_string(
  'topology', None, f'KIND:SHAPE, KIND one of {", ".join(chips.CHIPS)}.'
)
_SLICES = flags.DEFINE_integer('slices', 1, 'Number of slices, joined by DCN.')
_MESH = flags.DEFINE_enum(
  'mesh',
  None,
  ['auto', 'config'],
  'auto: the mesh of a simple rule; config: its own. Without it, auto where '
  'the config leaves its mesh at the default.',
)
_PROMPT = flags.DEFINE_integer(
  'prompt_tokens',
  None,
  'Tokens of the opening of an episode, an assumption; without it 512, or half '
  'of the context where that is less.',
)
_OBSERVATION = flags.DEFINE_integer(
  'observation_tokens', 128, 'Tokens of each later observation, an assumption.'
)
_RESPONSE = flags.DEFINE_integer(
  'response_tokens', None, 'Tokens sampled in a turn; without it, the most.'
)
_TURNS = flags.DEFINE_integer(
  'turns', None, 'Turns of an episode; without it, the most.'
)
_REACHED = flags.DEFINE_list(
  'reached',
  ['1', '1', '1'],
  'Shares of the peaks of compute, memory and network that are taken to be '
  'reached; 1,1,1 makes the times bounds.',
)
_PRICE = flags.DEFINE_float(
  'price', None, 'Dollars per chip and hour; without it, the list price.'
)
_FUSED = flags.DEFINE_bool(
  'fused', False, 'Compile score and update as one program, too; slow.'
)
_JSON = flags.DEFINE_string('json', None, 'File for all figures.')
_TABLE = flags.DEFINE_bool(
  'table', False, 'All sizes and algorithms on all --topologies.'
)
_SCALE = flags.DEFINE_bool('scale', False, 'From 1 to 4,096 chips.')
_TOPOLOGIES = flags.DEFINE_list(
  'topologies', ['v5e:4x4', 'v6e:4x4', 'v5p:2x2x4'], 'Slices of the table.'
)
_SIZES = flags.DEFINE_list(
  'sizes', ['0.5b', '1.5b', '3b'], 'Model sizes of the table.'
)
_ALGOS = flags.DEFINE_list(
  'algos', list(schema.ALGOS), 'Algorithms of the table.'
)
flags.declare_key_flag('config')

_TABLE_CONFIG = 'configs/sokoban.py'
_OF_ONE = ('topology', 'slices', 'mesh', 'fused')
_OF_TABLE = ('topologies', 'sizes', 'algos')
# Set before jax is imported: compile for a TPU, but do not look for one.
_ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_MIN_LOG_LEVEL': '3',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TF_CPP_MIN_LOG_LEVEL': '3',
  # None of several processes on this machine has a TPU.
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}


def main(argv: list[str]):
  """Check the input, then compile."""
  del argv
  os.environ.update(_ENVIRONMENT)
  _check_flags()
  if _JSON.value:
    paths.check_file('--json', pathlib.Path(_JSON.value))
  run = _table if _TABLE.value else _scale if _SCALE.value else _one
  try:
    run()
  except chips.UsageError as error:
    raise errors.UsageError(str(error)) from error


def _one():
  """One config on one topology."""
  if not _TOPOLOGY.value:
    raise errors.UsageError('--topology is missing; e.g. --topology=v5e:4x4')
  topology = chips.parse(_TOPOLOGY.value, _SLICES.value)
  question = _question(flags_lib.config(), topology)
  _require_libtpu()

  from actfocus_jax.aot import report

  found = _answer(question)
  if 'refused' in found:
    print(f'{found["config"]} on {found["topology"]}: {found["refused"]}.')
  else:
    print(report.describe(found))
  _save(found)


def _table():
  """All sizes and algorithms; then the smallest slice for each of them."""
  topologies = [chips.parse(x, flag='--topologies') for x in _TOPOLOGIES.value]
  for flag, values, allowed in (
    ('--sizes', _SIZES.value, tuple(presets.MODELS)),
    ('--algos', _ALGOS.value, schema.ALGOS),
    ('--topologies', _TOPOLOGIES.value, None),
  ):
    if not values:
      raise errors.UsageError(f'{flag} is empty; leave it out for its default.')
    unknown = [x for x in values if allowed and x not in allowed]
    if unknown:
      raise errors.UsageError(
        f'{flag} has {unknown[0]!r}; allowed: {", ".join(allowed)}.'
      )
  kinds = dict.fromkeys(topology.chip.name for topology in topologies)
  configs = {
    f'{size}, {algo}': _config_of(size, algo)
    for size in _SIZES.value
    for algo in _ALGOS.value
  }
  _require_libtpu()

  from actfocus_jax.aot import report

  @functools.cache
  def answer(name: str, topology: chips.Topology):
    return _answer(_question(configs[name], topology))

  cells = [(name, topology) for name in configs for topology in topologies]
  _print((name, answer(name, topology)) for name, topology in cells)
  print('\nThe smallest slice that fits:\n')
  cells = [(name, kind) for name in configs for kind in kinds]
  _print(
    (name, report.smallest(chips.all_of(kind), functools.partial(answer, name)))
    for name, kind in cells
  )


def _scale():
  """From 1 to 4,096 chips: a fixed batch, and one that grows with the chips."""
  given = _config_of('3b', 'ppo')
  _require_libtpu()

  from actfocus_jax.aot import report

  def answer(name: str, kind: str, count: int, grows: bool):
    topology = chips.with_chips(kind, count)
    if topology is None:
      none = f'{kind} has no slice of {count}'
      return {'topology': kind, 'fits': False, 'refused': none}
    c = copy.deepcopy(given)
    with c.unlocked():
      for field, value in report.growing(count).items() if grows else ():
        section, name = field.split('.')
        c[section][name] = value
    return _answer(_question(c, topology))

  _print(
    (f'{line}, {count}', answer(line, kind, count, grows))
    for line, kind, counts, grows in report.LINES
    for count in counts
  )


def _check_flags():
  """Refuse flags that the command would not read."""
  command_flag, unread = '--topology', _OF_TABLE
  if _TABLE.value or _SCALE.value:
    command_flag = '--table' if _TABLE.value else '--scale'
    unread = _OF_ONE if _TABLE.value else _OF_ONE + _OF_TABLE
  for name in unread:
    if flags.FLAGS[name].present:
      allowed = [f'--{x}' for x in _OF_ONE + _OF_TABLE if x not in unread]
      raise errors.UsageError(
        f'--{name} is given, but {command_flag} does not read it; allowed: '
        f'{", ".join(allowed) or "neither of these"}.'
      )
  argument = re.search(r'--config[= ]\S*[:,](size|algo)=', ' '.join(sys.argv))
  if argument and command_flag != '--topology':
    raise errors.UsageError(
      f'--config says {argument[1]}, which {command_flag} sets itself; '
      'allowed: a config without it.'
    )


# --- Questions and answers ---------------------------------------------------


def _answer(question) -> dict[str, Any]:
  """Compile the programs of a question."""
  from actfocus_jax.aot import report

  def note(text: str):
    print(f'  {question.topology}: {text}', file=sys.stderr, flush=True)

  found = report.answer(question, note=note)
  c = question.c
  name = pathlib.Path(c.model.path).name or 'the small model'
  return {'config': f'{name}, {c.algo}', 'reached': _reached(), **found}


_printed: list[dict[str, Any]] = []


def _print(answers: Iterable[tuple[str, dict[str, Any]]]):
  """Print a row for each answer as soon as it is there."""
  from actfocus_jax.aot import report

  print(report.HEAD)
  for name, found in answers:
    print(report.row(name, found), flush=True)
    _printed.append(found)
    _save(_printed)


def _save(found: Any):
  if _JSON.value:
    file = pathlib.Path(_JSON.value)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1))


def _config_of(size: str, algo: str) -> ml_collections.ConfigDict:
  """The paper's settings, or those of --config, for a size and an algorithm."""
  arguments = f'size={size},algo={algo}'
  if flags_lib.CONFIG.value is not None:
    return flags_lib.config_with(arguments)
  if not pathlib.Path(_TABLE_CONFIG).is_file():
    raise errors.UsageError(
      f'{_TABLE_CONFIG} is not here; name a config file by --config.'
    )
  return flags_lib.read_config(_TABLE_CONFIG, arguments)


def _question(c: ml_collections.ConfigDict, topology: chips.Topology):
  """A config on slices, with the reached peaks and the price of the flags."""
  from actfocus_jax.aot import report

  compute, memory, network = _reached()
  config, work = _shape(c), _workload(c)
  price = topology.chip.price if _PRICE.value is None else _PRICE.value
  if not (math.isfinite(price) and price >= 0):
    raise errors.UsageError(f'--price is {price}; allowed: 0 or more.')
  chip = dataclasses.replace(
    topology.chip,
    flops=topology.chip.flops * compute,
    hbm_bandwidth=topology.chip.hbm_bandwidth * memory,
    ici_bandwidth=topology.chip.ici_bandwidth * network,
    dcn_bandwidth=topology.chip.dcn_bandwidth * network,
    price=price,
  )
  default = schema.schema_of(c).mesh.to_dict()
  mesh = _MESH.value or ('auto' if c.mesh.to_dict() == default else 'config')
  topology = dataclasses.replace(topology, chip=chip)
  is_auto = mesh == 'auto'
  return report.Question(c, config, topology, work, is_auto, _FUSED.value)


def _shape(c: ml_collections.ConfigDict) -> architecture.Config:
  """The architecture, known or read from a directory; nothing is fetched."""
  path = c.model.path
  if not path or path in presets.SHAPES:
    return build.architecture_of(c)
  directory = pathlib.Path(path).expanduser()
  if not (directory / 'config.json').is_file():
    raise errors.UsageError(
      f'model.path is {path!r}; allowed: {", ".join(presets.SHAPES)}, or a '
      'directory with a config.json. Nothing is fetched here.'
    )
  try:
    return files.config(directory)
  except ValueError as error:
    raise errors.UsageError(f'model.path is {path!r}: {error}') from error


def _workload(c: ml_collections.ConfigDict):
  """Tokens of an episode, from the flags and the limits of the config."""
  from actfocus_jax.aot import programs

  most, turns = c.limits.response_tokens, schema.most_turns(c)
  prompt = min(512, c.limits.context // 2)
  for flag, value, limit in (
    ('--prompt_tokens', _PROMPT.value, c.limits.context - 1),
    ('--observation_tokens', _OBSERVATION.value, c.limits.context - 1),
    ('--response_tokens', _RESPONSE.value, most),
    ('--turns', _TURNS.value, turns),
  ):
    if value is not None and not 1 <= value <= limit:
      raise errors.UsageError(f'{flag} is {value}; allowed: 1 to {limit}.')
  return programs.Workload(
    prompt_tokens=_PROMPT.value or prompt,
    observation_tokens=_OBSERVATION.value,
    response_tokens=_RESPONSE.value or most,
    turns=_TURNS.value or turns,
    context=c.limits.context,
    steps=c.rollout.decode_steps,
    is_most=_RESPONSE.value is None and _TURNS.value is None,
  )


def _reached() -> list[float]:
  try:
    shares = [float(text) for text in _REACHED.value]
  except ValueError:
    shares = []
  if len(shares) != 3 or not all(0 < x <= 1 for x in shares):
    raise errors.UsageError(
      f'--reached is {",".join(_REACHED.value)!r}; allowed: three numbers '
      'above 0 and up to 1, of compute, memory and network.'
    )
  return shares


def _require_libtpu():
  if importlib.util.find_spec('libtpu') is None:
    raise errors.UsageError(
      'libtpu is not installed; `pip install "jax[tpu]"` in an environment of '
      'its own brings it (no TPU is needed, but with it other commands look '
      'for one).'
    )


if __name__ == '__main__':
  flags_lib.run(main)
