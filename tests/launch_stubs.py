"""A copy of launch/ in which every program of a cloud is a stub.

A stub writes its arguments, NUL-ended, into a file of its own, then does what
a test told it to do, nothing by default.
"""

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What a shell, a YAML file or a naive `"$*"` would spoil.
AWKWARD = (
  '--config.env.name=own module:Class',
  '--config.note=it\'s a "quoted" $HOME `id` $(id) * & ; | < > # ! \\ é',
  '--config.mixture=a=1,b=2;c:3',
  '--config.empty=',
  '',
  '-x',
)
TRAINING = (
  '--config=configs/sokoban.py:size=3b,algo=ppo',
  '--workdir=gs://b/r',
)

# A Python that makes environments and trains until SIGTERM.
PYTHON = """
case "$*" in
  *version_info*) exit 0 ;;
  *sys.version*) echo 3.12 ;;
  *"uv python find"*) echo "$0" ;;
  *"-m venv"*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" || true ;;
  *"actfocus_jax.train --dry_run"*)
    case "$*" in *refused-alone*) echo "error: no" >&2; exit 2 ;; esac
    ;;
  *actfocus_jax.train*)
    case "$*" in *refused-together*) sleep 0.2; echo "error: we"; exit 2 ;; esac
    echo "step 0"
    trap 'echo saved; exit 0' TERM
    while :; do sleep 0.05; done
    ;;
esac
"""

# xpk 1.16, as strict as its parser; of `create` the flags that may be of use.
XPK = """
known=' --cluster --project --zone --namespace --quiet '
case $2 in
  create)
    known+='--workload --command --tpu-type --num-slices --docker-image '
    known+='--base-docker-image --script-dir --env --env-file --storage '
    known+='--max-restarts --restart-on-exit-codes --scheduler --priority '
    known+='--termination-grace-period-seconds --ttl-seconds-after-finished '
    known+='--spot --reservation --on-demand --flex '
    ;;
  delete) known+='--workload --filter-by-job --filter-by-status --force ' ;;
  list) known+='--filter-by-job --filter-by-status ' ;;
  *) known= ;;
esac
for argument in "${@:3}"; do
  [[ $known == *" ${argument%%=*} "* ]] && continue
  echo "xpk: error: unrecognized arguments: $argument" >&2
  exit 2
done
"""

_RECORD = """#!/bin/bash
number=$(ls "$STUB_CALLS" | wc -l)
printf '%s\\0' "${{0##*/}}" "$@" >"$STUB_CALLS/$(printf '%03d' "$number")"
{body}
"""


class Machine:
  """A home, a project with launch/ in it, and the stubs on PATH.

  Attributes:
    home: the directory that ssh would land in.
    root: the project, whose name holds a space.
    environment: what the scripts see; nothing of the caller's.
  """

  def __init__(self, directory: pathlib.Path):
    self.home = directory / 'home'
    self.root = directory / 'my project'
    self._bin = directory / 'bin'
    self._calls = directory / 'calls'
    for made in (self.home, self._bin, self._calls):
      made.mkdir()
    shutil.copytree(ROOT / 'launch', self.root / 'launch')
    (self.root / 'requirements.txt').write_text('jax\n')
    self.environment = {
      'PATH': f'{self._bin}:{os.environ["PATH"]}',
      'HOME': str(self.home),
      'STUB_CALLS': str(self._calls),
      'START_SECONDS': '1',
    }
    for program in ('gcloud', 'srun', 'scontrol', 'kubectl', 'docker'):
      self.stub(program)
    self.stub('podman')
    self.stub('xpk', XPK)
    for program in ('tar', 'mkdir'):
      self.stub(program, f'exec {shutil.which(program)} "$@"')

  def stub(self, program: str, body: str = '') -> pathlib.Path:
    return script(self._bin / program, body)

  def calls(self) -> list[list[str]]:
    """What was run, in order."""
    return [
      path.read_bytes().decode().split('\0')[:-1]
      for path in sorted(self._calls.iterdir())
    ]

  def forget(self) -> None:
    for path in self._calls.iterdir():
      path.unlink()

  def start(self, name: str, *arguments: str, **environment: str):
    return subprocess.Popen(
      ['bash', str(self.root / 'launch' / name), *arguments],
      cwd=self.root,
      env={**self.environment, **environment},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  def run(self, name: str, *arguments: str, **environment: str):
    """Runs a script of launch/ to its end."""
    process = self.start(name, *arguments, **environment)
    try:
      out, err = process.communicate(timeout=30)
    finally:
      end(process)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


def end(process: subprocess.Popen) -> None:
  """Kills what the process has left of its session, and itself."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.communicate(timeout=10)


def script(path: pathlib.Path, body: str) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(_RECORD.format(body=body))
  path.chmod(0o755)
  return path


def succeeds(result) -> str:
  assert result.returncode == 0, result.stderr
  return result.stdout


def assert_refused(machine: Machine, result, *words: str) -> None:
  """One sentence, exit code 2, and nothing was run."""
  assert result.returncode == 2, result.stderr
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ')
  for word in words:
    assert word in line, line
  assert result.stdout == ''
  assert machine.calls() == []


def assert_dry_run_tells_the_truth(machine: Machine, *arguments: str) -> None:
  """What --dry-run prints is what is run without it, word for word."""
  name, *rest = arguments
  end = rest.index('--') if '--' in rest else len(rest)
  told = succeeds(machine.run(name, *rest[:end], '--dry-run', *rest[end:]))
  assert machine.calls() == []
  succeeds(machine.run(name, *rest))
  assert machine.calls() == commands(told)
  assert machine.calls()


def wait_until(condition, seconds: float = 10) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(0.02)


def commands(told: str) -> list[list[str]]:
  """The commands that a shell would read; an argument may hold line breaks."""
  commands, start = [], 0
  for end, character in enumerate(told):
    if character == '\n':
      try:
        commands.append(shlex.split(told[start:end]))
      except ValueError:  # This line break is inside quotes.
        continue
      start = end + 1
  return commands
