"""Real processes of one run on this machine, for tests."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from importlib import metadata

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMEOUT = 420  # seconds

# Runs before a command, in its process: a dead process is noticed soon.
IMPATIENT = """
from actfocus_jax.parallel import processes
processes._HEARTBEAT_TIMEOUT = 6
"""
# In jax only process 0 writes the compilation cache. Here each process has its
# own programs, and all share a disk.
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


# jaxlib 0.12 has only the newer one.
_HAS_OLD_GENERATOR = metadata.version('jaxlib').startswith('0.10.')


def environment(devices=1, computes_little=True):
  """Return variables for quick compilation on simulated devices.

  Tests compile much and compute little. Programs that compile slowly are
  cached for other processes. XLA's newer code generator for CPUs and most of
  its optimizations would double or triple the time of compilation.
  """
  xla = [f'--xla_force_host_platform_device_count={devices}']
  if _HAS_OLD_GENERATOR:  # XLA aborts on a flag that it does not know.
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
  """Start processes that share simulated devices evenly.

  Args:
    count: number of processes.
    arguments: arguments of the command.
    devices: number of devices of all processes together.
    module: module of the command.
    before: code that runs in each process before the command.
    code: code that runs instead of a command.
    own: index of a process -> more arguments for it alone.
    computes_little: as for `environment`.

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
  """Return (exit code, output) of each; kill all after the timeout."""
  end = time.monotonic() + timeout
  try:
    outputs = [
      process.communicate(timeout=max(end - time.monotonic(), 1))[0]
      for process in started
    ]
  finally:
    for process in started:
      process.kill()
  return [
    (process.returncode, output)
    for process, output in zip(started, outputs, strict=True)
  ]


def finished(started, timeout=TIMEOUT):
  """Return the output of each; all must end with exit code 0."""
  done = finish(started, timeout)
  assert [code for code, _ in done] == [0] * len(done), done
  return [output for _, output in done]


def wait_for(condition, started, timeout=TIMEOUT):
  """Wait until a condition holds while all processes run."""
  end = time.monotonic() + timeout
  while not condition():
    dead = [process for process in started if process.poll() is not None]
    if dead or time.monotonic() > end:
      for process in started:
        process.kill()
      outputs = [process.communicate()[0][-3000:] for process in started]
      raise AssertionError('\n'.join(outputs))
    time.sleep(0.05)
