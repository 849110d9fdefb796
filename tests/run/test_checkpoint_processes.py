"""Checkpoints of two processes are those of one, and vice versa."""

import time

import processes
import pytest

SECONDS = 90  # for what takes 5

# what, folder, shapes of meshes as 4x2,4x1, and which process of several
_PROCESS = """
import pathlib, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
what, folder, shapes, *who = sys.argv[1:]
if who:
  coordinator, count, index = (flag.partition('=')[2] for flag in who)
  jax.distributed.initialize(
    coordinator, int(count), int(index), heartbeat_timeout_seconds=6
  )
  assert jax.process_count() == 2 and len(jax.local_devices()) == 4
from actfocus_jax.config import schema
from actfocus_jax.run import directory

def leaf(mesh, shape, spec, seed):
  rng = np.random.default_rng(seed)
  whole = rng.standard_normal(shape).astype(np.float32)
  return whole, NamedSharding(mesh, spec)

def leaves_on(fsdp, tensor):
  mesh = jax.make_mesh(
    (fsdp, tensor),
    ('fsdp', 'tensor'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[: fsdp * tensor],
  )
  return {
    'matrix': leaf(mesh, (16, 8), P('fsdp', 'tensor'), 0),
    'norm': leaf(mesh, (8,), P(), 1),
    'rows': leaf(mesh, (32, 4), P('fsdp'), 2),
  }

def abstract(leaves):
  return {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    for name, (x, s) in leaves.items()
  }

def run_directory():
  config = schema.to_json(schema.defaults())
  return directory.RunDirectory(pathlib.Path(folder), config, {'sha256': ''})

def arrays(leaves):
  return {
    name: jax.make_array_from_callback(x.shape, s, lambda i, x=x: x[i])
    for name, (x, s) in leaves.items()
  }

def save(leaves):
  state = arrays(leaves)
  with run_directory() as run:
    assert run.restore(abstract(leaves)) == (None, 10_000)
    for step in (1, 2, 3):
      run.metrics.append({'step': step})
      run.save(step, state, step / 10, 10_000 + 8 * step)
def read(leaves):
  with run_directory() as run:
    state, seed = run.restore(abstract(leaves))
  assert seed == 10_024
  for name, (x, s) in leaves.items():
    assert state[name].sharding == s
    for shard in state[name].addressable_shards:
      np.testing.assert_array_equal(shard.data, x[shard.index])

def fail(leaves):
  # The disk of process 1 is full when it writes step 2.
  import pytest
  from run import test_checkpoint
  state = arrays(leaves)
  with pytest.MonkeyPatch.context() as patch, run_directory() as run:
    run.save(1, state, None, 0)
    run._checkpoints.wait()
    if jax.process_index() == 1:
      test_checkpoint.fill_the_disk(patch)
    run.save(2, state, None, 0)
    print('goes on')
    run.save(3, state, None, 0)  # Waits for the one before.

do = {'save': save, 'read': read, 'fail': fail}[what]
for shape in shapes.split(','):
  do(leaves_on(*map(int, shape.split('x'))))
  print(what, shape, 'in process', jax.process_index())
"""


def run(count, what, folder, *shapes):
  """Return what processes print that save or read on eight devices."""
  arguments = (what, folder, ','.join(shapes))
  started = processes.start(count, arguments, code=_PROCESS)
  return ''.join(processes.finished(started, SECONDS))


@pytest.fixture(scope='module')
def by_two(tmp_path_factory):
  folder = tmp_path_factory.mktemp('by_two')
  run(2, 'save', folder, '4x2')
  return folder


def test_two_processes_save_one_run(by_two):
  folders = sorted(p.name for p in (by_two / 'checkpoints').iterdir())
  assert folders == ['2', '3']
  lines = (by_two / 'metrics.jsonl').read_text().splitlines()
  assert lines == [f'{{"step": {step}}}' for step in (1, 2, 3)]


def test_one_process_restores_what_two_saved(by_two):
  shapes = ('4x2', '4x1', '1x2', '1x1')
  printed = run(1, 'read', by_two, *shapes)
  assert all(f'read {shape} in process 0' in printed for shape in shapes)


def test_two_processes_restore_what_one_saved(tmp_path):
  run(1, 'save', tmp_path, '4x2')
  printed = run(2, 'read', tmp_path, '4x2')
  assert all(f'read 4x2 in process {i}' in printed for i in (0, 1))


def test_failed_save_in_one_process_ends_both(tmp_path):
  begin = time.monotonic()
  started = processes.start(2, ['fail', tmp_path, '4x2'], code=_PROCESS)
  (code, output), (other, failed) = processes.finish(started, SECONDS)
  assert other == 1 and failed.count('goes on') == 1
  assert failed.rstrip().endswith('OSError: [Errno 28] No space left on device')
  assert code not in (0, None) and 'goes on' in output
  assert time.monotonic() - begin < SECONDS - 30
  folders = [p.name for p in (tmp_path / 'checkpoints').iterdir()]
  assert '1' in folders and '2' not in folders
