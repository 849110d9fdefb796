"""Counts the programs that XLA has compiled in this process."""

import jax.monitoring

_EVENT = '/jax/core/compile/backend_compile_duration'
_count = 0
_started = False


def start():
  """Starts to count; a second call changes nothing."""
  global _started
  if not _started:
    jax.monitoring.register_event_duration_secs_listener(_listen)
    _started = True


def count() -> int:
  """Compilations since `start`."""
  return _count


def _listen(event: str, duration: float, **_):
  global _count
  if event == _EVENT:
    _count += 1
