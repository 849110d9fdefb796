"""A run in a bucket equals one on a disk; needs the server of test_storage."""

import jax
import processes
import pytest
import test_end_to_end as whole_run
from run import test_storage

from actfocus_jax import errors, loop
from actfocus_jax.config import schema
from actfocus_jax.run import directory, metrics, storage

server = test_storage.server


@pytest.mark.slow
def test_run_in_a_bucket_equals_one_on_a_disk(server, cache, tmp_path):
  place = storage.path(f'gs://{test_storage.BUCKET}/run')
  with jax.numpy_dtype_promotion('standard'):
    c = whole_run.config(cache)
    loop.train(c, tmp_path / 'disk')
    loop.train(whole_run.config(cache, num_steps=2), place)
    summary = loop.train(c, place)
    step, row = loop.evaluate(c, place, 2)
    with (
      directory.RunDirectory(
        tmp_path / 'other', schema.to_json(c), {'sha256': ''}
      ),
      pytest.raises(errors.UsageError, match='checkpoints .* are: 2, 4'),
    ):
      loop.evaluate(c, place, 3)
  whole_run.assert_same_run(tmp_path / 'disk', place)
  assert step == 2
  assert row['success'] == metrics.read(place / 'eval.jsonl')[1]['success']
  assert summary == place / 'report' / 'summary.md'
  names = [path.name for path in (place / 'report').iterdir()]
  assert sorted(names) == ['curve.png', 'summary.md', 'trajectories.html']
  assert not (place / '.lock').exists()


# Resumes from the newest checkpoint, if there is one, and saves the next.
_GOES_ON = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from actfocus_jax.parallel import processes
from actfocus_jax.config import schema
from actfocus_jax.run import directory, storage
who = [flag.partition('=')[2] for flag in sys.argv[2:]]
processes.start(
  coordinator=who[0], num_processes=int(who[1]), process_id=int(who[2])
)
directory._SEEN_WITHIN = 10.0
place = storage.path(sys.argv[1])
if place.exists():  # As a command looks at it.
  list(place.iterdir())
mesh = jax.make_mesh(
  (2,), ('x',), axis_types=(jax.sharding.AxisType.Auto,)
)
sharding = NamedSharding(mesh, P('x'))
def leaf(value):
  x = np.full((8,), value, np.float32)
  return {'x': jax.make_array_from_callback(x.shape, sharding, x.__getitem__)}
with (
  processes.exit_on_error(),
  directory.open_run(
    place, schema.to_json(schema.defaults()), {'sha256': ''}
  ) as run,
):
  state, seed = run.restore(leaf(0.0))
  done = 0 if state is None else seed - schema.FIRST_TRAINING_SEED
  if done:
    np.testing.assert_array_equal(state['x'].addressable_data(0), done)
  run.metrics.append({'step': done + 1})
  seed = schema.FIRST_TRAINING_SEED + done + 1
  run.save(done + 1, leaf(done + 1.0), None, seed)
"""


@pytest.mark.slow
def test_two_processes_resume_in_a_bucket(server):
  where = f'gs://{test_storage.BUCKET}/two/run'
  for _ in range(2):
    started = processes.start(2, [where], devices=2, code=_GOES_ON)
    processes.finished(started, 120)
  place = storage.path(where)
  steps = [row['step'] for row in metrics.read(place / 'metrics.jsonl')]
  assert steps == [1, 2]
  folders = sorted(path.name for path in (place / 'checkpoints').iterdir())
  assert folders == ['1', '2']
