"""Commands as users call them, without paying for imports each time.

A server process imports the slow libraries once and forks for each command.
Variables of the environment are read at import, so a command that is given
some starts a process of its own.
"""

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys

import processes

ROOT = pathlib.Path(__file__).resolve().parent.parent
_SERVER = """
import json, os, runpy, sys, tempfile
from actfocus_jax import build, loop
from actfocus_jax.cli import cluster, dry_run, paths
from actfocus_jax.report import comparison, summary
for line in sys.stdin:
  module, arguments = json.loads(line)
  files = [tempfile.TemporaryFile('w+') for _ in range(2)]
  pid = os.fork()
  if not pid:
    for file, number in zip(files, (1, 2)):
      os.dup2(file.fileno(), number)
    sys.argv = [module, *arguments]
    sys.stdin, code = open(os.devnull), 0
    try:
      name = 'actfocus_jax.' + module
      runpy.run_module(name, run_name='__main__', alter_sys=True)
    except SystemExit as end:
      code = end.code or 0
    except BaseException:
      import traceback
      traceback.print_exc()
      code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
  code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  out = []
  for file in files:
    file.seek(0)
    out.append(file.read())
  print(json.dumps([code, *out]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen:
  server = subprocess.Popen(
    [sys.executable, '-c', _SERVER],
    cwd=ROOT,
    env={**os.environ, **processes.environment()},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  atexit.register(server.kill)
  return server


def command(
  module: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess:
  """`python -m actfocus_jax.MODULE ARGUMENTS` in the project's root."""
  if environment:
    return subprocess.run(
      [sys.executable, '-m', f'actfocus_jax.{module}', *arguments],
      cwd=ROOT,
      env={**os.environ, **processes.environment(), **environment},
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )
  server = _server()
  server.stdin.write(json.dumps([module, arguments]) + '\n')
  server.stdin.flush()
  code, out, err = json.loads(server.stdout.readline())
  return subprocess.CompletedProcess(arguments, code, out, err)


def train(workdir: pathlib.Path, *arguments: str, config='quickstart'):
  """The training command of a config of the project."""
  return command(
    'train',
    f'--config=configs/{config}.py',
    f'--workdir={workdir}',
    *arguments,
  )


def assert_refused(result: subprocess.CompletedProcess, *words: str):
  """One sentence on stderr that has these words, exit code 2."""
  assert result.returncode == 2, result.stderr
  (line,) = result.stderr.strip().splitlines()
  assert line.startswith('error: ')
  for word in words:
    assert word in line
