"""Trains a policy, or goes on where the last run in the workdir stopped.

python -m actfocus_jax.train --config=configs/quickstart.py --workdir=DIR
python -m actfocus_jax.train --config=configs/quickstart.py --dry_run

Ctrl-C and SIGTERM finish the step, save and report; the exit code is 130 or 143
then, and 0 only without a signal.

Bad input is refused here, before the slow imports; the algorithm is in
`loop.train`. One of several processes joins the others first, so that what is
wrong on one machine is told on all.
"""

import os
import sys

from absl import flags

from actfocus_jax import errors, sizes
from actfocus_jax.cli import cluster, dry_run, paths
from actfocus_jax.cli import flags as flags_lib
from actfocus_jax.config import presets
from actfocus_jax.run import interrupt, storage

_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Print config, work and memory of a step, and stop.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
flags.declare_key_flag('config')
flags.adopt_module_key_flags(cluster)


def main(argv: list[str]):
  """Checks the input, then trains."""
  del argv
  if _DRY_RUN.value:
    c = flags_lib.config()
    is_known = c.model.path in presets.SHAPES
    print(dry_run.describe(c, None if is_known else paths.check_model(c)))
    return
  if not _WORKDIR.value:
    raise errors.UsageError(
      '--workdir is missing; e.g. --workdir=runs/quickstart'
    )
  cluster.check()
  with cluster.joined():
    with cluster.raise_everywhere():
      c, workdir = flags_lib.config(), storage.path(_WORKDIR.value)
      paths.check_workdir(workdir, c)
      paths.pin_model(c, workdir)
      if c.model.path in presets.SHAPES:  # Before anything is fetched.
        sizes.check_splits(c, None)
      paths.check_model(c)
    cluster.check_configs(c)

    # Imported late: it takes seconds, and the checks above should not.
    from actfocus_jax import loop

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
