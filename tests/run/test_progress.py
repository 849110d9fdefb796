"""Plain lines, time left, and the bar."""

import pytest

from actfocus_jax.run import progress


class Clock:
  """Clock that a test moves."""

  def __init__(self):
    self.now = 100.0

  def monotonic(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(progress, 'time', clock)
  return clock


def test_plain_prints_one_line_a_step(capsys, clock):
  with progress.Progress('train', 3, plain=True) as display:
    for step in (1, 2, 3):
      clock.now += 10.0
      display.update(step, **{'train/success': step / 8, 'tokens': 12345})
    display.note('evaluation [95 %]')
  assert capsys.readouterr().out.splitlines() == [
    'train 1/3  train/success 0.125  tokens 12,345  left -',
    'train 2/3  train/success 0.25  tokens 12,345  left 10s',
    'train 3/3  train/success 0.375  tokens 12,345  left 0s',
    'evaluation [95 %]',
  ]


def test_plain_interval_keeps_first_and_last_line(capsys, clock):
  with progress.Progress('warm', 10, plain=True, interval=3.5) as display:
    for step in range(1, 11):
      clock.now += 1.0
      display.update(step)
  lines = capsys.readouterr().out.splitlines()
  steps = [line.split()[1] for line in lines]
  assert steps == ['1/10', '5/10', '9/10', '10/10']


def test_seconds_left_without_first_step_and_old_steps(clock):
  with progress.Progress('train', 200, plain=True) as display:
    clock.now += 1000.0  # compiles
    display.update(1)
    assert display.seconds_left() is None
    clock.now += 6.0
    display.update(3)
    assert display.seconds_left() == pytest.approx(197 * 3.0)
    for step in range(4, 24):
      clock.now += 0.5
      display.update(step)
    assert display.seconds_left() == pytest.approx(177 * 0.5)


def test_without_a_terminal_prints_lines(capsys):
  with progress.Progress('train', 1) as display:
    display.update(1)
  assert capsys.readouterr().out == 'train 1/1  left -\n'


def test_bar_keeps_values_and_escapes_notes(capsys):
  with progress.Progress('train', 4, plain=False) as display:
    display.update(1, success=0.5, word='[red]')
    display.note('held out [bold]0.25')
    display.update(2, success=0.75)
  out = capsys.readouterr().out
  assert 'held out [bold]0.25\n' in out
  last = out[out.rindex('train') :]
  assert '2/4' in last
  assert 'success 0.75' in last
  assert 'word [red]' in last


@pytest.mark.parametrize(
  ('value', 'written'),
  [
    (None, '-'),
    ('word', 'word'),
    (0.0, '0'),
    (1234567, '1,234,567'),
    (-12345.6, '-12,346'),
    (12.345, '12.3'),
    (0.001234, '0.00123'),
    (0.0000123, '1.2e-05'),
    (float('nan'), 'nan'),
  ],
)
def test_compact(value, written):
  assert progress.compact(value) == written


@pytest.mark.parametrize(
  ('seconds', 'written'),
  [(None, '-'), (59.4, '59s'), (59.6, '1m00s'), (187, '3m07s'),
   (3599.7, '1h00m'), (18120, '5h02m')],
)  # fmt: skip
def test_duration(seconds, written):
  assert progress.duration(seconds) == written
