"""Guards of the whole suite: eight CPU devices, strict ranks and dtypes.

The environment must be set before jax is first imported, so it is set here;
processes that tests start inherit it.
"""

import os
import sys
import threading
import time

import processes

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
os.environ |= processes.environment(devices=8)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')


def pytest_collection_modifyitems(config, items):
  """Files with slow tests come first where processes share the files.

  The longest begun last would keep one process waiting for the other.
  """
  if hasattr(config, 'workerinput'):
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
  """Where whole runs keep what they start from, so that it is made once."""
  import small_run

  own = tmp_path_factory.getbasetemp()
  is_worker = 'PYTEST_XDIST_WORKER' in os.environ
  folder = (own.parent if is_worker else own) / 'warm_starts'
  small_run.make_warm_start(small_run.config(folder))
  return folder


def idle():
  """Threads of a host of environments that wait for a call."""
  frames = sys._current_frames()
  return [
    thread
    for thread in threading.enumerate()
    if thread.name == 'environment'
    and (frame := frames.get(thread.ident))
    and frame.f_code.co_name == '_work'
  ]


@pytest.fixture(autouse=True)
def no_host_is_left():
  """Whoever opens a host of environments closes it."""
  yield
  end = time.monotonic() + 2.0
  while left := idle():
    assert time.monotonic() < end, f'{len(left)} threads of a host are left'
    time.sleep(0.01)
