"""Real processes of one run, on this machine, for tests."""

import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMEOUT = 420  # seconds, of anything


def free_port():
  with socket.socket() as made:
    made.bind(('localhost', 0))
    return made.getsockname()[1]


def start(count, arguments, *, devices=8, module='actfocus_jax.train'):
  """Starts processes that share simulated devices evenly.

  Args:
    count: How many.
    arguments: Of the command.
    devices: Of all processes together.
    module: The command.

  Returns:
    The processes; their output is text, stdout and stderr in one.
  """
  flag = f'--xla_force_host_platform_device_count={devices // count}'
  environ = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': flag,
    'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.jax_cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
  }
  port = free_port()
  started = []
  for i in range(count):
    who = [
      f'--coordinator=localhost:{port}',
      f'--num_processes={count}',
      f'--process_id={i}',
    ]
    started.append(
      subprocess.Popen(
        [sys.executable, '-u', '-m', module, *arguments, *(who * (count > 1))],
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
