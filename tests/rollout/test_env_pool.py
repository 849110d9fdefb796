"""Calls that raise or hang cost themselves; the others come back in order."""

import threading
import time

import pytest

from actfocus_jax.rollout import env_pool


def run(pool, calls, seconds=20):
  """`hosts.run(calls)`, or a failed test where it waits for ever."""
  found = []
  waiting = threading.Thread(
    target=lambda: found.append(pool.run(calls)), daemon=True
  )
  waiting.start()
  waiting.join(seconds)
  assert found, f'nothing came back for {seconds} s'
  return found[0]


@pytest.mark.parametrize('threads', [0, 1, 4])
def test_results_keep_the_order_of_calls(threads):
  pool = env_pool.EnvPool(threads)
  calls = [lambda i=i: i * i for i in range(9)]
  assert pool.run(calls) == [i * i for i in range(9)]
  assert pool.run([]) == []
  pool.close()


class Unspeakable(Exception):
  def __str__(self):
    raise TypeError('no words')


@pytest.mark.parametrize('threads', [0, 2])
@pytest.mark.parametrize(
  ('error', 'reason'),
  [
    (SystemExit(3), 'SystemExit: 3'),
    (GeneratorExit('gone'), 'GeneratorExit: gone'),
    (Unspeakable(), 'Unspeakable: (without a readable message)'),
    (ValueError('x\udc80\ny'), 'ValueError: x\\udc80'),
  ],
)
def test_raising_call_fails_alone(threads, error, reason):
  def fail():
    raise error

  pool = env_pool.EnvPool(threads)
  first, *others = run(pool, [fail, lambda: 1, lambda: 2])
  assert first.reason == reason and others == [1, 2]
  (first.reason + first.details).encode()  # Files and terminals take it.
  # No thread has died of it.
  assert run(pool, [fail, fail, lambda: 3])[2] == 3
  pool.close()


def test_keyboard_interrupt_passes_only_in_the_callers_thread():
  def interrupted():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    env_pool.EnvPool().run([interrupted])
  with env_pool.EnvPool(1) as pool:
    (lost,) = run(pool, [interrupted])
  assert lost.reason == 'KeyboardInterrupt: '


def test_threads_run_at_the_same_time():
  meet = threading.Barrier(3)
  with env_pool.EnvPool(3) as pool:
    assert len(pool.run([lambda: meet.wait(5)] * 3)) == 3


def test_hanging_call_is_abandoned():
  end = threading.Event()

  def hang():
    end.wait(20)  # Not for ever, should the limit be broken.

  pool = env_pool.EnvPool(2, time_limit=0.2)
  begin = time.monotonic()
  out = run(pool, [hang, lambda: 1, hang, lambda: 2, hang])
  assert time.monotonic() - begin < 5
  assert [x for x in out if not isinstance(x, env_pool.Failed)] == [1, 2]
  assert out[0] == out[2] == out[4] == env_pool.Failed('took longer than 0.2 s')
  # As many threads as before take what comes next.
  meet = threading.Barrier(2)
  assert len(run(pool, [lambda: meet.wait(5)] * 2)) == 2
  end.set()
  pool.close()


def test_time_limit_does_not_count_the_queue():
  with env_pool.EnvPool(1, time_limit=0.3) as pool:
    out = pool.run([lambda i=i: time.sleep(0.1) or i for i in range(6)])
  assert out == list(range(6))


@pytest.mark.parametrize('arguments', [(-1, None), (2, 0.0), (0, 1.0)])
def test_arguments_out_of_range_are_refused(arguments):
  with pytest.raises(ValueError, match='time_limit'):
    env_pool.EnvPool(*arguments)
