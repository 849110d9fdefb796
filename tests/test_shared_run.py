"""What a process sees of a directory; real processes are in test_pair.py."""

import pytest

from actfocus_jax import errors
from actfocus_jax.parallel import processes
from actfocus_jax.run import shared


@pytest.mark.parametrize('newest', [-2, -1, 8, 12])
def test_all_see_the_mark_and_the_newest_checkpoint(
  tmp_path, monkeypatch, newest
):
  monkeypatch.setattr(shared, '_SEEN_WITHIN', -1.0)
  run = tmp_path / 'run'
  mark = run / '.mark'
  assert not shared._is_seen(mark, 'word', newest)
  run.mkdir()
  if newest > -2:
    (run / 'checkpoints').mkdir()
    (run / 'checkpoints' / '13.orbax-checkpoint-tmp').mkdir()
  if newest > -1:
    (run / 'checkpoints' / str(newest)).mkdir()
  assert not shared._is_seen(mark, 'word', newest)
  mark.write_text('another')
  assert not shared._is_seen(mark, 'word', newest)
  mark.write_text('word')
  assert shared._is_seen(mark, 'word', newest)
  assert not shared._is_seen(mark, 'word', newest + 1)


def test_what_appears_late_is_seen(tmp_path, monkeypatch):
  mark = tmp_path / 'run' / '.mark'

  def sleep(seconds):
    (mark.parent / 'checkpoints' / '3').mkdir(parents=True)
    mark.write_text('word')

  monkeypatch.setattr(shared.time, 'sleep', sleep)
  assert shared._is_seen(mark, 'word', 3)


def test_a_checkpoint_that_one_sees_is_waited_for_by_all(tmp_path, monkeypatch):
  """Whoever it is: the listing of process 0 may be the stale one."""
  asked = []

  def seen(mark, word, newest):
    asked.append(newest)
    return True

  def exchange(value):
    others = ('.theirs', 12) if isinstance(value, tuple) else value
    return [value, others]

  monkeypatch.setattr(processes, 'allgather', exchange)
  monkeypatch.setattr(shared, '_is_seen', seen)
  shared.check_shared(tmp_path)
  assert asked == [12]


@pytest.mark.parametrize('sees', [True, False])
def test_the_mark_does_not_stay(tmp_path, monkeypatch, sees):
  run = tmp_path / 'run'
  marks = []

  def exchange(value):
    marks.extend(run.iterdir() if run.is_dir() else ())
    return [value, sees if isinstance(value, bool) else value]

  monkeypatch.setattr(processes, 'allgather', exchange)
  if sees:
    shared.check_shared(run)
  else:
    with pytest.raises(errors.UsageError, match='process 1 does not see'):
      shared.check_shared(run)
  assert marks and list(run.iterdir()) == []
