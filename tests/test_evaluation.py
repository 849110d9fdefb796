"""The line that an evaluation prints, and what it refuses."""

import pathlib

import pytest

from actfocus_jax import errors, evaluation
from actfocus_jax.parallel import processes

ROW = {
  'success': 0.25,
  'success_low': 0.125,
  'success_high': 0.5,
  'pass_at_g': 0.75,
  'episodes': 64,
  'failed': 0.0,
}
PLAIN = (
  'step 7: held-out success 25.0% (95 % interval 12.5% to 50.0%), '
  'pass@G 75.0%, 64 episodes'
)


def test_one_environment():
  assert evaluation.line(7, ROW) == PLAIN


def test_a_shop_has_a_purchase_rate_also_where_nothing_was_bought():
  row = ROW | {'info/bought': 0.0, 'info/reward': 0.1}
  assert evaluation.line(7, row) == f'{PLAIN}, purchase rate 0.0%'


def test_failures_and_the_parts_of_a_mixture():
  row = ROW | {'failed': 0.5, 'a/success': 0.5, 'a/failed': 0, 'b/success': 0.0}
  assert evaluation.line(7, row) == (
    f'{PLAIN}; the environment failed in 50.0% of them; a 50.0%, b 0.0%'
  )


@pytest.mark.parametrize(
  ('workdir', 'step', 'told'),
  [
    ('runs/other', 2, "--workdir is 'runs/one' in process 0 and 'runs/other'"),
    ('runs/one', 3, '--step is 2 in process 0 and 3 in process 1; allowed: '),
  ],
)
def test_processes_that_mean_other_checkpoints_are_refused(
  monkeypatch, workdir, step, told
):
  theirs = iter([workdir, step])

  def exchange(value):
    return [value, next(theirs)]

  monkeypatch.setattr(processes, 'allgather', exchange)
  with pytest.raises(errors.UsageError, match=told):
    evaluation.evaluate_checkpoint(None, pathlib.Path('runs/one'), 2)
