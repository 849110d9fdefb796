"""Real processes of one run, on this machine, for tests."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from importlib import metadata

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMEOUT = 420  # seconds, of anything


# Runs before a command, in its process: a dead neighbour is noticed soon.
IMPATIENT = """
from actfocus_jax.parallel import processes
processes._HEARTBEAT_TIMEOUT = 6
"""
# jax lets the first process alone keep what it compiles; here each has programs
# of its own, and all one disk.
_KEEP = """
def _keep_all():
  from unittest import mock
  from jax._src import compiler, distributed
  write = compiler._cache_write
  def keep(*arguments):
    with mock.patch.object(distributed.global_state, 'process_id', 0):
      write(*arguments)
  compiler._cache_write = keep
_keep_all()
"""
_RUN = """
import runpy, sys
runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)
"""


# jaxlib 0.12 has the newer one alone.
_HAS_OLD_GENERATOR = metadata.version('jaxlib').startswith('0.10.')


def environment(devices=1, computes_little=True):
  """What makes jax quick to compile, on so many simulated devices.

  Tests compile much and compute little. What takes half a second is kept for
  other processes; XLA's newer generator of code for the CPU and most of its
  optimizations take two to three times as long over the same programs.
  """
  xla = [f'--xla_force_host_platform_device_count={devices}']
  if _HAS_OLD_GENERATOR:  # XLA ends a process that names a flag it lacks.
    xla.append('--xla_cpu_use_fusion_emitters=false')
  return {
    'XLA_FLAGS': ' '.join(xla),
    'JAX_DISABLE_MOST_OPTIMIZATIONS': str(int(computes_little)),
    'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.jax_cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
  }


def free_port():
  with socket.socket() as made:
    made.bind(('localhost', 0))
    return made.getsockname()[1]


def start(
  count,
  arguments,
  *,
  devices=8,
  module='actfocus_jax.train',
  before='',
  code=None,
  own=None,
  computes_little=True,
):
  """Starts processes that share simulated devices evenly.

  Args:
    count: How many.
    arguments: Of the command.
    devices: Of all processes together.
    module: The command.
    before: Code that runs in each process before the command.
    code: Runs instead of a command.
    own: By the index of a process: more arguments of its own.
    computes_little: As of `environment`.

  Returns:
    The processes; their output is text, stdout and stderr in one.
  """
  environ = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    **environment(devices // count, computes_little),
    'PYTHONPATH': f'{ROOT}:{ROOT}/tests:{os.environ.get("PYTHONPATH", "")}',
  }
  port = free_port()
  what = ['-c', f'{_KEEP}{before}{code or _RUN}', *([] if code else [module])]
  started = []
  for i in range(count):
    who = [
      f'--coordinator=localhost:{port}',
      f'--num_processes={count}',
      f'--process_id={i}',
    ]
    each = [*map(str, arguments), *(own or {}).get(i, [])]
    started.append(
      subprocess.Popen(
        [sys.executable, '-u', *what, *each, *(who * (count > 1))],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
  return started


def finish(started, timeout=TIMEOUT):
  """(exit code, output) of each; all are killed after the timeout."""
  end = time.monotonic() + timeout
  try:
    outputs = [
      one.communicate(timeout=max(end - time.monotonic(), 1))[0]
      for one in started
    ]
  finally:
    for one in started:
      one.kill()
  return [
    (one.returncode, output)
    for one, output in zip(started, outputs, strict=True)
  ]


def finished(started, timeout=TIMEOUT):
  """The output of each; all must end well."""
  done = finish(started, timeout)
  assert [code for code, _ in done] == [0] * len(done), done
  return [output for _, output in done]


def wait_for(condition, started, timeout=TIMEOUT):
  """Waits until something holds while all processes run."""
  end = time.monotonic() + timeout
  while not condition():
    dead = [one for one in started if one.poll() is not None]
    if dead or time.monotonic() > end:
      for one in started:
        one.kill()
      outputs = [one.communicate()[0][-3000:] for one in started]
      raise AssertionError('\n'.join(outputs))
    time.sleep(0.05)
