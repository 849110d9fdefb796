"""A run on 8 devices resumes on 4, 2 and 1 with the same step."""

import functools
import shutil

import jax
import numpy as np
import pytest
import small_run

from actfocus_jax import build, loop
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.run import metrics

# Metrics of a step and their relative tolerance; absolute 1e-6.
CLOSE = {
  'actor/loss': 1e-4,
  'actor/grad_norm': 1e-4,
  'actor/entropy': 1e-4,
  'actor/clip_fraction': 1e-4,
  'weights/action_mass': 1e-4,
  'signal/mean': 1e-4,
}
# Number of devices -> fields of the mesh.
MESHES = {
  8: dict(mesh__data=1, mesh__fsdp=4, mesh__tensor=2),
  4: dict(mesh__data=1, mesh__fsdp=2, mesh__tensor=2),
  2: dict(mesh__data=1, mesh__fsdp=2),
  1: dict(),
}


@pytest.fixture(scope='module', autouse=True)
def ordinary_promotion():
  with jax.numpy_dtype_promotion('standard'):
    yield


def train(cache, workdir, devices, steps, **changes):
  """Train up to a step on some devices; return the row of that step."""
  fixed = dict(num_steps=steps, checkpoint__every=1)
  c = small_run.config(cache, **(fixed | MESHES[devices] | changes))
  whole = mesh_lib.make_mesh
  part = functools.partial(whole, devices=jax.devices()[:devices])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, 'make_mesh', part)
    assert build.mesh(c).size == devices
    loop.train(c, workdir)
  return metrics.read(workdir / 'metrics.jsonl')[steps - 1]


def assert_close(row, expected):
  for name, rtol in CLOSE.items():
    print(name, expected[name], abs(row[name] - expected[name]))
    np.testing.assert_allclose(
      row[name], expected[name], rtol=rtol, atol=1e-6, err_msg=name
    )


@pytest.fixture(scope='module')
def by_eight(cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('eight')
  train(cache, workdir, 8, 1)
  return workdir


@pytest.fixture(scope='module')
def next_step(cache, by_eight, tmp_path_factory):
  """The second step of a run that stays on 8 devices."""
  workdir = tmp_path_factory.mktemp('stays') / 'run'
  shutil.copytree(by_eight, workdir)
  return train(cache, workdir, 8, 2)


@pytest.mark.slow
@pytest.mark.parametrize('devices', [4, 2, 1])
def test_resume_on_fewer_devices_makes_the_same_step(
  cache, by_eight, next_step, tmp_path, devices
):
  shutil.copytree(by_eight, tmp_path / 'run')
  row = train(cache, tmp_path / 'run', devices, 2)
  first = metrics.read(by_eight / 'metrics.jsonl')[0]
  assert row['train/tokens'] == next_step['train/tokens']
  assert_close(row, next_step)
  # And it differs from the first step.
  assert abs(first['actor/loss'] - next_step['actor/loss']) > 1e-3


@pytest.mark.slow
def test_fewer_boards_than_row_shards_make_the_same_step(cache, tmp_path):
  """Each of 8 shards plays half of a group."""
  boards = dict(rollout__prompts=4, rollout__members=4, eval__prompts=3)
  mesh = dict(mesh__data=2, mesh__fsdp=4, mesh__tensor=1)
  row = train(cache, tmp_path / 'eight', 8, 1, **boards, **mesh)
  alone = train(cache, tmp_path / 'one', 1, 1, **boards)
  assert row['train/tokens'] == alone['train/tokens']
  assert_close(row, alone)
