"""Compiles a run for a TPU slice that is not there: memory, work, time.

python -m actfocus_jax.aot --config=configs/sokoban.py:size=3b,algo=ppo \
  --topology=v5e:4x4
python -m actfocus_jax.aot --table --out=runs/aot
python -m actfocus_jax.aot --scale --out=runs/aot

It needs libtpu, no TPU, and neither weights nor the network:
`pip install "jax[tpu]"` in an environment of its own, for with libtpu
installed other commands look for a TPU. Bad input is refused here, before the
slow imports.
"""

import importlib.util
import json
import math
import os
import pathlib
import re
import sys

import jax
import ml_collections
from absl import flags

from actfocus_jax import errors, sizes
from actfocus_jax.aot import chips, roofline, topology, workload
from actfocus_jax.cli import flags as flags_lib
from actfocus_jax.cli import paths
from actfocus_jax.config import presets, schema
from actfocus_jax.model import architecture, files

_TOPOLOGY = flags.DEFINE_string(
  'topology', None, f'KIND:SHAPE, KIND one of {", ".join(chips.CHIPS)}.'
)
_SLICES = flags.DEFINE_integer('slices', 1, 'How many of them, joined by DCN.')
_MESH = flags.DEFINE_enum(
  'mesh',
  None,
  ['auto', 'config'],
  'auto: the fastest mesh that fits, by formula; config: its own. Without '
  'it, auto where the config leaves its mesh at the default.',
)
_PROMPT = flags.DEFINE_integer(
  'prompt_tokens',
  None,
  'Of the opening of an episode, an assumption; without it 512, or half of the '
  'context where that is less.',
)
_OBSERVATION = flags.DEFINE_integer(
  'observation_tokens', 128, 'Of each later observation, an assumption.'
)
_RESPONSE = flags.DEFINE_integer(
  'response_tokens', None, 'Sampled in a turn; without it, the most.'
)
_TURNS = flags.DEFINE_integer(
  'turns', None, 'In an episode; without it, the most.'
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
_JSON = flags.DEFINE_string('json', None, 'A file for all figures.')
_TABLE = flags.DEFINE_bool(
  'table', False, 'All sizes and algorithms on all --topologies, into --out.'
)
_SCALE = flags.DEFINE_bool(
  'scale', False, 'From 1 to 4,096 chips, as a plot, into --out.'
)
_OUT = flags.DEFINE_string('out', None, 'Directory of --table and --scale.')
_JOBS = flags.DEFINE_integer(
  'jobs',
  None,
  'Cells of --table and --scale that are compiled at a time; without it as '
  'many as there are cores, and 6 GiB of free memory for each.',
)
_TOPOLOGIES = flags.DEFINE_list(
  'topologies', ['v5e:4x4', 'v6e:4x4', 'v5p:2x2x4'], 'Of the table.'
)
_SIZES = flags.DEFINE_list('sizes', ['0.5b', '1.5b', '3b'], 'Of the table.')
_ALGOS = flags.DEFINE_list('algos', list(schema.ALGOS), 'Of the table.')
flags.declare_key_flag('config')

_TABLE_CONFIG = 'configs/sokoban.py'
# Flags that only one of the three commands reads.
_OF_ONE = ('topology', 'slices', 'mesh', 'fused', 'json')
_OF_TABLE = ('topologies', 'sizes', 'algos')
_OF_SEVERAL = ('out', 'jobs')
# What compiling a cell takes of this machine's memory, and some more.
_JOB_BYTES = 6 * 2**30


def main(argv: list[str]):
  """Checks the input, then compiles."""
  del argv
  _check_flags()
  if _TABLE.value or _SCALE.value:
    _several()
    return
  if not _TOPOLOGY.value:
    raise errors.UsageError('--topology is missing; e.g. --topology=v5e:4x4')
  where = topology.parse(_TOPOLOGY.value, _SLICES.value)
  c = flags_lib.config()
  config, work = _shape(c), _workload(c)
  efficiency = _efficiency()
  if _JSON.value:
    paths.check_file('--json', pathlib.Path(_JSON.value))
  _prepare()

  # Imported late: it takes seconds, and jax must not look for a TPU.
  from actfocus_jax.aot import cells, many, table

  told = cells.answer(
    cells.Question(
      c,
      config,
      where,
      work,
      efficiency,
      price=_PRICE.value,
      is_auto=_is_auto(c),
      with_fused=_FUSED.value,
    ),
    note=many.note,
  )
  told['config'] = f'{pathlib.Path(c.model.path).name or "the small model"}, '
  told['config'] += c.algo
  if 'refused' in told:
    print(f'{told["config"]} on {told["topology"]}: {told["refused"]}.')
  else:
    print(table.describe(told))
  if _JSON.value:
    file = pathlib.Path(_JSON.value)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told, indent=1))


def _check_flags():
  """Refuses flags that the command would not read."""
  if _TABLE.value:
    asked, unread = '--table', _OF_ONE
  elif _SCALE.value:
    asked, unread = '--scale', _OF_ONE + _OF_TABLE
  else:
    asked, unread = '--topology', _OF_TABLE + _OF_SEVERAL
  given = next((name for name in unread if flags.FLAGS[name].present), None)
  every = _OF_ONE + _OF_TABLE + _OF_SEVERAL
  beside = ', '.join(f'--{name}' for name in every if name not in unread)
  if given:
    raise errors.UsageError(
      f'--{given} is given, but {asked} does not read it; allowed: {beside}.'
    )
  named = re.search(r'--config[= ]\S*[:,](size|algo)=', ' '.join(sys.argv))
  if named and asked != '--topology':
    raise errors.UsageError(
      f'--config says {named[1]}, which {asked} chooses itself; allowed: '
      f'{beside}, and a config without it.'
    )


def _several():
  """The table and the plot, each cell of which is kept in --out."""
  if not _OUT.value:
    raise errors.UsageError('--out is missing; e.g. --out=runs/aot')
  out = pathlib.Path(_OUT.value)
  paths.check_writable('--out', out)
  wheres = [
    topology.parse(text, named='--topologies has') for text in _TOPOLOGIES.value
  ]
  for flag, values, allowed in (
    ('--sizes', _SIZES.value, tuple(presets.MODELS)),
    ('--algos', _ALGOS.value, schema.ALGOS),
    ('--topologies', _TOPOLOGIES.value, None),
  ):
    if not values:
      raise errors.UsageError(f'{flag} is empty; leave it out for its default.')
    for value in values:
      if allowed and value not in allowed:
        raise errors.UsageError(
          f'{flag} has {value!r}; allowed: {", ".join(allowed)}.'
        )
  if _JOBS.value is not None and _JOBS.value < 1:
    raise errors.UsageError(f'--jobs is {_JOBS.value}; allowed: 1 or more.')
  efficiency = _efficiency()
  _prepare()

  from actfocus_jax.aot import many, scale

  asks = many.Asks(
    _config_of, _workload, efficiency, _PRICE.value, out, _jobs()
  )
  out.mkdir(parents=True, exist_ok=True)
  if _TABLE.value:
    print(many.table_of(asks, _SIZES.value, _ALGOS.value, wheres))
  if _SCALE.value:
    print(scale.run(asks))


def _jobs() -> int:
  if _JOBS.value is not None:
    return _JOBS.value
  free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  return max(1, min(os.cpu_count() or 1, free // _JOB_BYTES))


def _config_of(size: str, algo: str, **changes: int):
  """A config of the paper's settings, and the shape of its model."""
  path = _TABLE_CONFIG
  if flags_lib.CONFIG.value is None and not pathlib.Path(path).is_file():
    raise errors.UsageError(
      f'{path} is not here; name a config file by --config.'
    )
  arguments = f'size={size},algo={algo}'
  if flags_lib.CONFIG.value is None:
    c = flags_lib.read_config(path, arguments)
  else:
    c = flags_lib.config_with(arguments)
  with c.unlocked():
    for field, value in changes.items():
      section, name = field.split('__')
      c[section][name] = value
  return c, _shape(c)


def _shape(c: ml_collections.ConfigDict) -> architecture.Config:
  """The architecture, known or of a directory; nothing is fetched."""
  path = c.model.path
  if not path or path in presets.SHAPES:
    return sizes.shape(c, None)
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


def _workload(c: ml_collections.ConfigDict) -> workload.Workload:
  """How long episodes are, from the flags and the limits of the config."""
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
  return workload.Workload(
    prompt_tokens=_PROMPT.value or prompt,
    observation_tokens=_OBSERVATION.value,
    response_tokens=_RESPONSE.value or most,
    turns=_TURNS.value or turns,
    context=c.limits.context,
    steps=c.rollout.decode_steps,
    is_most=_RESPONSE.value is None and _TURNS.value is None,
  )


def _efficiency() -> roofline.Efficiency:
  try:
    shares = [float(text) for text in _REACHED.value]
  except ValueError:
    shares = []
  if len(shares) != 3 or not all(0 < x <= 1 for x in shares):
    raise errors.UsageError(
      f'--reached is {",".join(_REACHED.value)!r}; allowed: three numbers '
      'above 0 and up to 1, of compute, memory and network.'
    )
  if _PRICE.value is not None and not (
    math.isfinite(_PRICE.value) and _PRICE.value >= 0
  ):
    raise errors.UsageError(f'--price is {_PRICE.value}; allowed: 0 or more.')
  return roofline.Efficiency(*shares)


def _is_auto(c: ml_collections.ConfigDict) -> bool:
  if _MESH.value:
    return _MESH.value == 'auto'
  default = schema.schema_of(c).mesh
  return c.mesh.to_dict() == default.to_dict()


def _prepare():
  """Makes jax compile for a TPU without looking for one.

  Raises:
    UsageError: When libtpu is not installed.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise errors.UsageError(
      'libtpu is not installed; `pip install "jax[tpu]"` in an environment of '
      'its own brings it (no TPU is needed, but with it other commands look '
      'for one).'
    )
  os.environ.update(
    JAX_PLATFORMS='cpu',
    TPU_SKIP_MDS_QUERY='1',
    TPU_MIN_LOG_LEVEL='3',
    TPU_STDERR_LOG_LEVEL='3',
    TF_CPP_MIN_LOG_LEVEL='3',
    # Several of these processes may run at a time: none of them has a TPU.
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    TPU_ACCELERATOR_TYPE='v5litepod-4',
    TPU_WORKER_HOSTNAMES='localhost',
  )
  # The config has imported jax, which reads JAX_PLATFORMS when imported.
  jax.config.update('jax_platforms', 'cpu')


if __name__ == '__main__':
  flags_lib.run(main)
