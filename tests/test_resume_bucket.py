"""A run in a bucket is the run on a disk; needs what test_storage.py does."""

import jax
import pytest
import test_end_to_end as whole_run
from run import test_storage

from actfocus_jax import evaluation, loop
from actfocus_jax.run import directory, metrics, settings, storage

server = test_storage.server


@pytest.mark.slow
def test_a_run_in_a_bucket_equals_one_on_a_disk(server, tmp_path):
  place = storage.path(f'gs://{test_storage.BUCKET}/run')
  with jax.numpy_dtype_promotion('standard'):
    c = whole_run.config(tmp_path / 'cache')
    loop.train(c, tmp_path / 'disk')
    loop.train(whole_run.config(tmp_path / 'cache', num_steps=2), place)
    summary = loop.train(c, place)
    step, row = evaluation.evaluate_checkpoint(c, place, 2)
    with (
      directory.RunDirectory(tmp_path / 'other', c, {'sha256': ''}),
      pytest.raises(settings.Refused, match='checkpoints .* are: 2, 4'),
    ):
      evaluation.evaluate_checkpoint(c, place, 3)
  whole_run.assert_same_run(tmp_path / 'disk', place)
  assert step == 2
  assert row['success'] == metrics.read(place / 'eval.jsonl')[1]['success']
  assert summary == place / 'report' / 'summary.md'
  names = [path.name for path in (place / 'report').iterdir()]
  assert sorted(names) == ['curve.png', 'summary.md', 'trajectories.html']
  assert not (place / '.lock').exists()
