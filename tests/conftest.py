"""Guards of the whole suite: eight CPU devices, strict ranks and dtypes.

The environment must be set before jax is first imported, so it is set here.
"""

import os
import pathlib
import sys
import threading
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
_FLAG = '--xla_force_host_platform_device_count=8'
if _FLAG not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}'.strip()

import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_compilation_cache_dir', str(ROOT / '.jax_cache'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def pytest_collection_modifyitems(config, items):
  """Files with slow tests come first where processes share the files.

  The longest begun last would keep one process waiting for the other.
  """
  if hasattr(config, 'workerinput'):
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)


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
