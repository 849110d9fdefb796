"""A checkpoint of two processes is that of one, and the other way round."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 90  # for what takes 5

# what, folder, fsdp, tensor, [coordinator, index]
_PROCESS = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
what, folder, fsdp, tensor, *where = sys.argv[1:]
if where:
  jax.distributed.initialize(where[0], 2, int(where[1]))
  assert jax.process_count() == 2 and len(jax.local_devices()) == 4
from actfocus_jax.run import checkpoint, directory, settings

fsdp, tensor = int(fsdp), int(tensor)
mesh = jax.make_mesh(
  (fsdp, tensor),
  ('fsdp', 'tensor'),
  axis_types=(jax.sharding.AxisType.Auto,) * 2,
  devices=jax.devices()[: fsdp * tensor],
)

def leaf(shape, spec, seed):
  rng = np.random.default_rng(seed)
  whole = rng.standard_normal(shape).astype(np.float32)
  return whole, NamedSharding(mesh, spec)

leaves = {
  'matrix': leaf((16, 8), P('fsdp', 'tensor'), 0),
  'norm': leaf((8,), P(), 1),
  'rows': leaf((32, 4), P('fsdp'), 2),
}
def abstract():
  return {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    for name, (x, s) in leaves.items()
  }

def run_directory():
  import pathlib
  c = settings.defaults()
  return directory.RunDirectory(
    pathlib.Path(folder), c, {'sha256': ''}, writes=jax.process_index() == 0
  )

if what == 'save':
  state = {
    name: jax.make_array_from_callback(x.shape, s, lambda i, x=x: x[i])
    for name, (x, s) in leaves.items()
  }
  with run_directory() as run:
    assert run.restore(abstract()) == (None, 10_000)
    for step in (1, 2, 3):
      run.metrics.append({'step': step})
      run.save(step, state, step / 10, 10_000 + 8 * step)
else:
  with run_directory() as run:
    state, seed = run.restore(abstract())
  assert seed == 10_024
  for name, (x, s) in leaves.items():
    assert state[name].sharding == s
    for shard in state[name].addressable_shards:
      np.testing.assert_array_equal(shard.data, x[shard.index])
  print('read', jax.process_index(), jax.device_count())
"""


def start(devices, *arguments):
  flag = f'--xla_force_host_platform_device_count={devices}'
  environment = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flag}
  return subprocess.Popen(
    [sys.executable, '-c', _PROCESS, *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(*processes):
  try:
    told = [process.communicate(timeout=SECONDS) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, err) in zip(processes, told, strict=True):
    assert process.returncode == 0, err
  return ''.join(out for out, _ in told)


def two_processes(what, folder):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    coordinator = f'localhost:{free.getsockname()[1]}'
  return finish(
    *(start(4, what, folder, 4, 2, coordinator, index) for index in (0, 1))
  )


@pytest.fixture(scope='module')
def by_two(tmp_path_factory):
  folder = tmp_path_factory.mktemp('by_two')
  two_processes('save', folder)
  return folder


def test_two_processes_leave_one_run(by_two):
  assert sorted(p.name for p in (by_two / 'checkpoints').iterdir()) == [
    '2',
    '3',
  ]
  lines = (by_two / 'metrics.jsonl').read_text().splitlines()
  assert lines == [f'{{"step": {step}}}' for step in (1, 2, 3)]


@pytest.mark.parametrize('shape', [(4, 2), (4, 1), (1, 2), (1, 1)])
def test_one_process_reads_what_two_wrote(by_two, shape):
  assert 'read 0 8' in finish(start(8, 'read', by_two, *shape))


def test_two_processes_read_what_one_wrote(tmp_path):
  finish(start(8, 'save', tmp_path, 4, 2))
  told = two_processes('read', tmp_path)
  assert 'read 0 8' in told and 'read 1 8' in told
