"""Signals set a flag; a second Ctrl-C does not wait."""

import os
import signal
import threading

import pytest

from actfocus_jax.run import interrupt


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_and_does_not_raise(number, capfd):
  before = signal.getsignal(number)
  with interrupt.Interrupt() as stop:
    assert (stop.requested, stop.signal) == (False, None)
    os.kill(os.getpid(), number)
    assert (stop.requested, stop.signal) == (True, number.name)
  assert signal.getsignal(number) is before
  assert f'{number.name}: stopping after this step' in capfd.readouterr().err


def test_the_second_sigint_raises_at_once():
  # Not the default one where the suite runs as a background job.
  before = signal.getsignal(signal.SIGINT)
  stop = interrupt.Interrupt()
  with pytest.raises(KeyboardInterrupt), stop:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
  assert stop.signal == 'SIGINT'
  assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_twice_goes_on_waiting_for_the_step():
  with interrupt.Interrupt() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == 'SIGTERM'


def test_handlers_come_back_after_an_error():
  with pytest.raises(RuntimeError), interrupt.Interrupt():
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    raise RuntimeError
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_in_another_thread_it_does_nothing():
  seen = []

  def body():
    before = signal.getsignal(signal.SIGINT)
    with interrupt.Interrupt() as stop:
      seen.append(signal.getsignal(signal.SIGINT) is before)
      seen.append(stop.requested)

  thread = threading.Thread(target=body)
  thread.start()
  thread.join()
  assert seen == [True, False]


def test_who_waits_outside_is_told_too():
  with interrupt.Interrupt() as outer:
    with interrupt.Interrupt():
      pass
    assert not outer.requested
    with interrupt.Interrupt():
      os.kill(os.getpid(), signal.SIGTERM)
    assert (outer.requested, outer.signal) == (True, 'SIGTERM')


def test_an_inner_one_knows_what_came_before_it():
  with interrupt.Interrupt() as outer:
    signal.raise_signal(signal.SIGTERM)
    with interrupt.Interrupt() as inner:
      assert (inner.requested, inner.signal) == (True, 'SIGTERM')
    assert outer.requested


def test_the_signal_of_another_process_counts():
  with interrupt.Interrupt() as stop:
    assert stop.agreed(lambda own: own) is None
    assert not stop.requested and stop.code == 0
    assert stop.agreed(lambda own: 'SIGTERM') == 'SIGTERM'
    assert (stop.requested, stop.code) == (True, 143)
