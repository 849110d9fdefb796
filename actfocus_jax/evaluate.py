r"""Held-out success of a run's checkpoint, or of a model directory.

python -m actfocus_jax.evaluate --workdir=DIR [--step=N] \
  [--model_path=HF_DIR] [--config.mesh.fsdp=N ...]
python -m actfocus_jax.evaluate --config=configs/NAME.py \
  --config.model.path=HF_DIR

Prints one line for people and one JSON object, and writes nothing. A run is
evaluated on its own mesh if that fits the devices, else on the default one.
"""

import json
import pathlib

import ml_collections
from absl import flags

from actfocus_jax import build, errors, evaluation, loop
from actfocus_jax.cli import cluster, paths
from actfocus_jax.cli import flags as flags_lib
from actfocus_jax.config import schema, validate
from actfocus_jax.parallel import processes
from actfocus_jax.run import storage

_WORKDIR = flags.DEFINE_string('workdir', None, 'A run to evaluate.')
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; default the newest.')
_PROMPTS = flags.DEFINE_integer(
  'prompts', None, 'Boards; default: eval.prompts.'
)
_MEMBERS = flags.DEFINE_integer(
  'members', None, 'Episodes per board; default: eval.members.'
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature',
  None,
  'Sampling temperature; default: eval.temperature.',
)
flags.declare_key_flag('config')
flags.declare_key_flag('help_config')
flags.declare_key_flag('model_path')
flags.adopt_module_key_flags(cluster)


def main(argv: list[str]):
  """Check the input, then play the held-out boards."""
  del argv
  cluster.check()
  with cluster.joined():
    with processes.raise_everywhere():
      workdir = storage.path(_WORKDIR.value) if _WORKDIR.value else None
      c = _config(workdir)
      with c.unlocked():
        for flag in (_PROMPTS, _MEMBERS, _TEMPERATURE):
          if flag.value is not None:
            c.eval[flag.name] = flag.value
      validate.check(c)
      paths.check_model(c.model, c.warm_start.cache)
    cluster.check_configs(schema.to_json(c))
    if workdir and not flags_lib.given_fields():
      build.fit_mesh(c)
    step, row = loop.evaluate(c, workdir, _STEP.value)
  print(evaluation.line(step, row))
  print(json.dumps({'step': step, **row}))


def _config(workdir: pathlib.Path | None) -> ml_collections.ConfigDict:
  if not workdir:
    if _STEP.value is not None:
      raise errors.UsageError('--step needs --workdir.')
    return flags_lib.config()
  if flags_lib.CONFIG.value is not None:
    raise errors.UsageError('--workdir and --config exclude each other.')
  given = flags_lib.given_fields()
  other = next((a for a in given if not a.startswith('--config.mesh.')), None)
  if other:
    raise errors.UsageError(
      f'{other} would change the run of --workdir; allowed: '
      '--config.mesh.NAME=SIZE.'
    )
  c = flags_lib.run_config(workdir)
  return flags_lib.overridden(c) if given else c


if __name__ == '__main__':
  flags_lib.run(main, changes='workdir')
