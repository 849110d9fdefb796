"""Make a warm start as a Hugging Face directory.

python -m actfocus_jax.warm_start --config=configs/quickstart.py --out=DIR

The directory holds config.json, model.safetensors and the tokenizer. Train
from it with --config.model.path=DIR.
"""

from absl import flags

from actfocus_jax import build, errors
from actfocus_jax.cli import flags as flags_lib
from actfocus_jax.cli import paths
from actfocus_jax.run import storage
from actfocus_jax.warmstart import model as warm_model

_OUT = flags.DEFINE_string('out', None, 'Directory to write.')
flags.declare_key_flag('config')
flags.declare_key_flag('help_config')


def main(argv: list[str]):
  """Check the input, then play, train and write."""
  del argv
  if not _OUT.value:
    raise errors.UsageError('--out is missing; e.g. --out=runs/base')
  c = flags_lib.config()
  out = storage.on_disk(_OUT.value, '--out')
  paths.check_new('--out', out)
  with build.refusing_misfits():
    plan = build.warm_start(c)
  with plan.pool:
    warm_model.make(plan, out)
  print(f'The model is in {out}')


if __name__ == '__main__':
  flags_lib.run(main)
