"""Train a policy, or go on where the last run in the workdir stopped.

python -m actfocus_jax.train --config=configs/quickstart.py --workdir=DIR
python -m actfocus_jax.train --config=configs/quickstart.py --dry_run
python -m actfocus_jax.train --help_config [SECTION]

Ctrl-C and SIGTERM finish the step, save and report. The exit code is then 130
or 143. The algorithm is in `loop.train`.
"""

import os
import sys

from absl import flags

from actfocus_jax import build, errors, loop
from actfocus_jax.cli import cluster, dry_run, paths
from actfocus_jax.cli import flags as flags_lib
from actfocus_jax.config import presets, schema
from actfocus_jax.parallel import processes
from actfocus_jax.run import interrupt, storage

_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Print config, work and memory of a step, and stop.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
flags.declare_key_flag('config')
flags.declare_key_flag('help_config')
flags.adopt_module_key_flags(cluster)


def main(argv: list[str]):
  """Check the input, then train."""
  del argv
  if _DRY_RUN.value:
    c = flags_lib.config()
    directory = None
    if c.model.path not in presets.SHAPES:
      directory = paths.check_model(c.model, c.warm_start.cache)
    build.check_mesh(c, directory)
    print(dry_run.describe(c, build.architecture_of(c, directory)))
    return
  if not _WORKDIR.value:
    raise errors.UsageError(
      '--workdir is missing; e.g. --workdir=runs/quickstart'
    )
  cluster.check()
  with cluster.joined():
    with processes.raise_everywhere():
      c, workdir = flags_lib.config(), storage.path(_WORKDIR.value)
      paths.check_workdir(workdir, schema.to_json(c))
      paths.pin_model(c.model, workdir)
      if c.model.path in presets.SHAPES:  # Before the model is fetched.
        build.check_mesh(c)
      build.check_mesh(c, paths.check_model(c.model, c.warm_start.cache))
    cluster.check_configs(schema.to_json(c))
    with interrupt.Interrupt() as stop:
      report = loop.train(c, workdir).parent
  if not storage.is_remote(report):
    report = os.path.abspath(report)
  print(
    f'The report is in {report}:\n'
    '  curve.png          the learning curve\n'
    '  trajectories.html  what the agent thought and did, to browse\n'
    '  summary.md         the numbers'
  )
  sys.exit(stop.code)


if __name__ == '__main__':
  flags_lib.run(main)
