"""Makes the small default model as a Hugging Face directory.

python -m actfocus_jax.warm_start --config=configs/quickstart.py --out=DIR

The directory holds config.json, model.safetensors and the tokenizer; train
from it with --config.model.path=DIR.
"""

from absl import flags

from actfocus_jax import errors
from actfocus_jax.cli import flags as flags_lib
from actfocus_jax.cli import paths
from actfocus_jax.run import storage

_OUT = flags.DEFINE_string('out', None, 'Directory to write.')
flags.declare_key_flag('config')


def main(argv: list[str]):
  """Checks the input, then plays, trains and writes."""
  del argv
  if not _OUT.value:
    raise errors.UsageError('--out is missing; e.g. --out=runs/base')
  c = flags_lib.config()
  out = storage.on_disk(_OUT.value, '--out')
  paths.check_new('--out', out)

  # Imported late: it takes seconds, and the checks above should not.
  from actfocus_jax import build
  from actfocus_jax.warmstart import model as warm_model

  with build.refusing_misfits():
    plan = build.warm_start(c)
  with plan.pool:
    warm_model.make(plan, out)
  print(f'The model is in {out}')


if __name__ == '__main__':
  flags_lib.run(main)
