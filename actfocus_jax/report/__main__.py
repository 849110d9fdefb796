"""Write diagnostics, plots and the trajectory viewer into DIR/report/.

python -m actfocus_jax.report --workdir=DIR [--workdirs=DIR1,DIR2,DIR3]
"""

import sys

from absl import app, flags, logging

from actfocus_jax.report import summary
from actfocus_jax.run import storage

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run directory.')
_WORKDIRS = flags.DEFINE_list(
  'workdirs', [], 'Run directories to compare in one picture and one table.'
)


def main(argv: list[str]) -> None:
  """Write the report and print its files; exit code 2 without a run."""
  logging.set_verbosity(logging.ERROR)  # gcsfs logs every look-up.
  if len(argv) > 1:
    sys.exit(_fail(f'unexpected argument {argv[1]!r}'))
  if not _WORKDIR.value:
    sys.exit(_fail('--workdir is missing; e.g. --workdir=runs/quickstart'))
  try:
    path = summary.write_report(
      storage.path(_WORKDIR.value),
      workdirs=[storage.path(run, '--workdirs') for run in _WORKDIRS.value],
    )
  except (FileNotFoundError, ValueError) as error:
    sys.exit(_fail(str(error)))
  for file in sorted(path.parent.iterdir()):
    print(file)


def _fail(sentence: str) -> int:
  print(f'error: {sentence}', file=sys.stderr)
  return 2


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except SystemExit:  # absl has printed the help, and leaves with 1.
    sys.exit(0)
  except flags.Error as error:
    sys.exit(_fail(' '.join(str(error).split())))


if __name__ == '__main__':
  app.run(main, flags_parser=_parse)
