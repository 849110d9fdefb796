"""Signals set a flag; a second Ctrl-C raises at once."""

import os
import signal
import threading

import pytest

from actfocus_jax.parallel import processes
from actfocus_jax.run import interrupt


@pytest.mark.parametrize(
  ('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_first_signal_sets_the_flag(number, code, capfd):
  before = signal.getsignal(number)
  with interrupt.Interrupt() as stop:
    assert (stop.requested, stop.signal, stop.code) == (False, None, 0)
    os.kill(os.getpid(), number)
    assert (stop.requested, stop.signal) == (True, number.name)
    assert stop.code == code
  assert signal.getsignal(number) is before
  assert f'{number.name}: stopping after this step' in capfd.readouterr().err


def test_second_sigint_raises_and_handlers_come_back():
  # Not the default handler if the suite runs as a background job.
  before = signal.getsignal(signal.SIGINT)
  stop = interrupt.Interrupt()
  with pytest.raises(KeyboardInterrupt), stop:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
  assert stop.signal == 'SIGINT'
  assert signal.getsignal(signal.SIGINT) is before


def test_second_sigterm_does_not_raise():
  with interrupt.Interrupt() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == 'SIGTERM'


def test_other_thread_sets_no_handler():
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


def test_nested_contexts_share_the_signal():
  with interrupt.Interrupt() as outer:
    with interrupt.Interrupt():
      pass
    assert not outer.requested
    with interrupt.Interrupt():
      os.kill(os.getpid(), signal.SIGTERM)
    assert (outer.requested, outer.signal) == (True, 'SIGTERM')
    with interrupt.Interrupt() as inner:
      assert (inner.requested, inner.signal) == (True, 'SIGTERM')


def test_agreed_signal_of_another_process_counts(monkeypatch):
  with interrupt.Interrupt() as stop:
    assert stop.agreed() is None
    assert not stop.requested and stop.code == 0
    monkeypatch.setattr(processes, 'first_non_none', lambda value: 'SIGTERM')
    assert stop.agreed() == 'SIGTERM'
    assert (stop.requested, stop.code) == (True, 143)
