r"""Held-out success of a run's checkpoint, or of a model directory.

python -m actfocus_jax.evaluate --workdir=DIR [--step=N] \
  [--model_path=HF_DIR] [--config.mesh.fsdp=N ...]
python -m actfocus_jax.evaluate --config=configs/NAME.py \
  --config.model.path=HF_DIR

Prints one line for people and one JSON object; writes nothing. A run is
evaluated on its own mesh where that fits the devices, else on the default one.
"""

import json

from absl import flags

from actfocus_jax import command, distributed, places
from actfocus_jax.run import checks, settings, storage

_WORKDIR = flags.DEFINE_string('workdir', None, 'A run to evaluate.')
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; default the newest.')
_PROMPTS = flags.DEFINE_integer('prompts', None, 'Boards; default as trained.')
_MEMBERS = flags.DEFINE_integer(
  'members', None, 'Episodes per board; default as trained.'
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature', None, 'Of sampling; default as trained.'
)
flags.declare_key_flag('config')
flags.declare_key_flag('model_path')
flags.adopt_module_key_flags(distributed)


def main(argv: list[str]):
  """Checks the input, then plays the held-out boards."""
  del argv
  distributed.check()
  with distributed.joined():
    with distributed.refusing_alike():
      workdir = storage.path(_WORKDIR.value) if _WORKDIR.value else None
      c = _config(workdir)
      with c.unlocked():
        for flag in (_PROMPTS, _MEMBERS, _TEMPERATURE):
          if flag.value is not None:
            c.eval[flag.name] = flag.value
      checks.check(c)
      places.check_model(c)
    distributed.check_configs(c)

    # Imported late: it takes seconds, and the checks above should not.
    from actfocus_jax import assemble, evaluation

    if workdir and not command.given_fields():
      assemble.fit_mesh(c)
    step, row = evaluation.evaluate_checkpoint(c, workdir, _STEP.value)
  print(evaluation.line(step, row))
  print(json.dumps({'step': step, **row}))


def _config(workdir):
  if not workdir:
    if _STEP.value is not None:
      raise settings.Refused('--step needs --workdir.')
    return command.config()
  if command.CONFIG.value is not None:
    raise settings.Refused('--workdir and --config exclude each other.')
  given = command.given_fields()
  other = next((a for a in given if not a.startswith('--config.mesh.')), None)
  if other:
    raise settings.Refused(
      f'{other} would change the run of --workdir; allowed: '
      '--config.mesh.NAME=SIZE.'
    )
  c = places.run_config(workdir, command.MODEL_PATH.value)
  return command.overridden(c) if given else c


if __name__ == '__main__':
  command.run(main, changes='workdir')
