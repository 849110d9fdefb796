"""What a process sees of a directory; real processes are in test_pair.py."""

import pytest

from actfocus_jax import shared_run
from actfocus_jax.parallel import processes
from actfocus_jax.run import refusals


@pytest.mark.parametrize('some', [False, True])
def test_all_see_the_mark_and_the_checkpoints_or_none(
  tmp_path, monkeypatch, some
):
  monkeypatch.setattr(shared_run, '_SEEN_WITHIN', -1.0)
  run = tmp_path / 'run'
  mark = run / '.mark'
  assert not shared_run._is_seen(mark, 'word', some)
  run.mkdir()
  if some:
    (run / 'checkpoints').mkdir()
  assert not shared_run._is_seen(mark, 'word', some)
  mark.write_text('another')
  assert not shared_run._is_seen(mark, 'word', some)
  mark.write_text('word')
  assert shared_run._is_seen(mark, 'word', some)
  assert not shared_run._is_seen(mark, 'word', not some)


def test_what_appears_late_is_seen(tmp_path, monkeypatch):
  mark = tmp_path / 'run' / '.mark'

  def sleep(seconds):
    mark.parent.mkdir()
    mark.write_text('word')

  monkeypatch.setattr(shared_run.time, 'sleep', sleep)
  assert shared_run._is_seen(mark, 'word', False)


@pytest.mark.parametrize('sees', [True, False])
def test_the_mark_does_not_stay(tmp_path, monkeypatch, sees):
  run = tmp_path / 'run'
  marks = []

  def exchange(value):
    marks.extend(run.iterdir() if run.is_dir() else ())
    return [value, sees if isinstance(value, bool) else value]

  monkeypatch.setattr(processes, 'exchange', exchange)
  if sees:
    shared_run.check_shared(run)
  else:
    with pytest.raises(refusals.Refused, match='process 1 does not see'):
      shared_run.check_shared(run)
  assert marks and list(run.iterdir()) == []
