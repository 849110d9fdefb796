"""Makes the small default model as a Hugging Face directory.

python -m actfocus_jax.warm_start --config=configs/quickstart.py --out=DIR

The directory holds config.json, model.safetensors and the tokenizer; train
from it with --config.model.path=DIR.
"""

from absl import flags

from actfocus_jax import command, places
from actfocus_jax.run import settings, storage

_OUT = flags.DEFINE_string('out', None, 'Directory to write.')
flags.declare_key_flag('config')


def main(argv: list[str]):
  """Checks the input, then plays, trains and writes."""
  del argv
  if not _OUT.value:
    raise settings.Refused('--out is missing; e.g. --out=runs/base')
  c = command.config()
  out = storage.on_disk(_OUT.value, '--out')
  places.check_new('--out', out)

  # Imported late: it takes seconds, and the checks above should not.
  from actfocus_jax import assemble, base_model

  with assemble.refusing_misfits():
    plan = assemble.warm_start(c)
  with plan.hosts:
    base_model.make(plan, out)
  print(f'The model is in {out}')


if __name__ == '__main__':
  command.run(main)
