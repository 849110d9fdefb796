r"""Write a trained policy as a Hugging Face directory.

python -m actfocus_jax.export --workdir=DIR --out=HF_DIR [--step=N] \
  [--dtype=float32|bfloat16|float16] [--model_path=HF_DIR]

transformers, vLLM and `--config.model.path` load the directory like any other.
The default is float32, the precision of training: the changes that
reinforcement learning makes are often finer than bfloat16. Runs on the CPU,
also beside a training that holds the accelerators.
"""

import jax
from absl import flags

from actfocus_jax import build, errors
from actfocus_jax.cli import flags as flags_lib
from actfocus_jax.cli import paths
from actfocus_jax.model import hf
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.run import storage
from actfocus_jax.text import vocabulary

_WORKDIR = flags.DEFINE_string('workdir', None, 'The run.')
_OUT = flags.DEFINE_string('out', None, 'Directory to write.')
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; default the newest.')
_DTYPE = flags.DEFINE_enum(
  'dtype',
  'float32',
  ['float32', 'bfloat16', 'float16'],
  'Type of weights.',
)

flags.declare_key_flag('model_path')


def main(argv: list[str]):
  """Check the input, then read the checkpoint and write the directory."""
  del argv
  if flags_lib.CONFIG.value is not None:
    raise errors.UsageError(
      '--config has no meaning here: --workdir names a run.'
    )
  if not _WORKDIR.value:
    raise errors.UsageError('--workdir is missing; e.g. --workdir=runs/base')
  if not _OUT.value:
    raise errors.UsageError('--out is missing; e.g. --out=models/mine')
  workdir = storage.path(_WORKDIR.value)
  out = storage.on_disk(_OUT.value, '--out')
  c = flags_lib.run_config(workdir)
  paths.check_new('--out', out)
  paths.check_model(c.model, c.warm_start.cache)
  jax.config.update('jax_platforms', 'cpu')
  mesh = mesh_lib.single_device_mesh()
  with jax.set_mesh(mesh), build.refusing_misfits():
    model = build.model(c, build.model_path(c), mesh)
    step, params = build.checkpoint(model, workdir, _STEP.value)
    hf.save(out, model.config, params, source=model.path, dtype=_DTYPE.value)
  print(f'The policy after step {step} is in {out}, in {_DTYPE.value}.')
  if not vocabulary.matches_auto_tokenizer(out):
    print(
      'Note: AutoTokenizer builds another tokenizer from these files than '
      'tokenizer.json describes; load it with PreTrainedTokenizerFast.'
    )


if __name__ == '__main__':
  flags_lib.run(main)
