r"""Compile a run for a TPU slice that this machine does not have.

python -m actfocus_jax.aot --config=configs/sokoban.py:size=3b,algo=ppo \
  --topology=v5e:4x4
python -m actfocus_jax.aot --config=configs/sokoban.py:size=3b,algo=ppo --scale

It prints memory, work and least time. It needs libtpu, no TPU, and neither
weights nor the network:
`pip install "jax[tpu]"` in an environment of its own, because with libtpu
installed other commands look for a TPU.
"""

import copy
import importlib.util
import json
import os
import pathlib
import sys
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
  'topology',
  None,
  f'KIND:SHAPE, KIND one of {", ".join(chips.CHIPS)}; KIND alone finds its '
  'smallest slice that fits.',
)
_SLICES = flags.DEFINE_integer('slices', 1, 'Number of slices, joined by DCN.')
_MESH = flags.DEFINE_enum(
  'mesh',
  None,
  ['auto', 'config'],
  'auto: the mesh of a simple rule; config: its own. Without it, auto if the '
  'config leaves its mesh at the default.',
)
_PROMPT = flags.DEFINE_integer(
  'prompt_tokens',
  None,
  'Tokens of the opening of an episode, an assumption; without it 512, or half '
  'of the context if that is less.',
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
_JSON = flags.DEFINE_string('json', None, 'File for all figures.')
_SCALE = flags.DEFINE_bool('scale', False, 'From 1 to 4,096 chips.')
flags.declare_key_flag('config')

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
  if _SCALE.value:
    for name in ('topology', 'slices', 'mesh'):
      if flags.FLAGS[name].present:
        raise errors.UsageError(
          f'--{name} is given, but --scale does not read it; leave it out.'
        )
  elif not _TOPOLOGY.value:
    raise errors.UsageError('--topology is missing; e.g. --topology=v5e:4x4')
  else:
    topologies = chips.parse(_TOPOLOGY.value, _SLICES.value)
  if _JSON.value:
    paths.check_file('--json', pathlib.Path(_JSON.value))
  c = flags_lib.config()
  config, work = _shape(c), _workload(c)
  if importlib.util.find_spec('libtpu') is None:
    raise errors.UsageError(
      'libtpu is not installed; `pip install "jax[tpu]"` in an environment of '
      'its own brings it (no TPU is needed, but with it other commands look '
      'for one).'
    )

  from actfocus_jax.aot import report

  def answer(topology: chips.Topology, c: ml_collections.ConfigDict = c):
    def note(text: str):
      print(f'  {topology}: {text}', file=sys.stderr, flush=True)

    default = schema.schema_of(c).mesh.to_dict()
    mesh = _MESH.value or ('auto' if c.mesh.to_dict() == default else 'config')
    found = report.answer(
      c, config, topology, work, is_auto=mesh == 'auto', note=note
    )
    name = pathlib.Path(c.model.path).name or 'the built-in model'
    return {'config': f'{name}, {c.algo}', **found}

  if _SCALE.value:
    _scale(c, answer)
  else:
    found = report.smallest(topologies, answer)
    print(report.describe(found))
    _save(found)


def _scale(c: ml_collections.ConfigDict, answer):
  """From 1 to 4,096 chips: a fixed batch, and one that grows with the chips."""
  from actfocus_jax.aot import report

  print(report.HEAD)
  answers = []
  for line, kind, counts, grows in report.LINES:
    for count in counts:
      topology = chips.with_chips(kind, count)
      if topology is None:
        none = f'{kind} has no slice of {count}'
        found = {'topology': kind, 'fits': False, 'refused': none}
      else:
        changed = copy.deepcopy(c)
        with changed.unlocked():
          changed.update_from_flattened_dict(
            report.growing(c, count) if grows else {}
          )
        found = answer(topology, changed)
      print(report.row(f'{line}, {count}', found), flush=True)
      answers.append(found)
      _save(answers)


def _save(found: Any):
  if _JSON.value:
    file = pathlib.Path(_JSON.value)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1))


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


if __name__ == '__main__':
  flags_lib.run(main)
