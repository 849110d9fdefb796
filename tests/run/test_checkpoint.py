"""Checkpoints: bit for bit on any mesh, rotated, whole or absent."""

import pathlib
import queue
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from orbax import checkpoint as ocp

from actfocus_jax.run import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]


def mesh_of(shape, names):
  auto = (jax.sharding.AxisType.Auto,) * len(names)
  return jax.make_mesh(shape, names, axis_types=auto)


def bits(x):
  return np.atleast_1d(np.asarray(x)).view(np.uint8)


def train_state():
  """State with every kind of leaf, and values that rounding would change."""
  sharding = NamedSharding(mesh_of((8,), ('fsdp',)), PartitionSpec('fsdp'))
  model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
  params = nnx.split(model, nnx.Param)[1]
  params = jax.tree.map(lambda x: jax.device_put(x, sharding), params)
  odd = np.array([np.nan, -0.0, np.inf, 1e-45, 0.1, 1 / 3, 2, 3], np.float32)
  return {
    'step': 7,
    'rate': 0.1,
    'params': params,
    'optimizer': optax.adamw(1e-3).init(params),
    'odd': jax.device_put(odd, sharding),
    'half': jnp.asarray(odd, jnp.bfloat16),
  }


def abstract(tree, sharding_of):
  return jax.tree.map(
    lambda x: (
      jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x))
      if isinstance(x, jax.Array)
      else type(x)()
    ),
    tree,
  )


def small(step):
  return {'a': jnp.full((4,), step, jnp.float32), 'step': step}


def test_restore_on_another_mesh_is_bitwise(tmp_path):
  state = train_state()
  store = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  store.save(7, state, {'metrics_lines': 7, 'seeds': [3, 4]}, success=0.5)
  store.close()

  mesh = mesh_of((2, 4), ('data', 'fsdp'))

  def sharding_of(x):
    split = 'fsdp' if x.ndim and x.shape[0] % 4 == 0 else None
    return NamedSharding(mesh, PartitionSpec(*[split] * min(x.ndim, 1)))

  other = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  assert other.latest_step() == 7
  wanted = abstract(state, sharding_of)
  restored, extra = other.restore(7, wanted)
  other.close()
  assert extra == {'metrics_lines': 7, 'seeds': [3, 4]}
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  pairs = zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True)
  for old, new in pairs:
    assert type(old) is type(new)
    np.testing.assert_array_equal(bits(old), bits(new))
    if isinstance(old, jax.Array):
      assert new.dtype == old.dtype
      assert new.sharding == sharding_of(old)
  assert state['odd'].sharding != restored['odd'].sharding


def test_before_the_first_save_nothing_is_on_disk(tmp_path):
  store = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  assert store.latest_step() is None
  store.wait()
  assert not (tmp_path / 'checkpoints').exists()
  with pytest.raises(FileNotFoundError, match='no checkpoint of step 3'):
    store.restore(3, small(0))
  store.close()
  assert list(tmp_path.iterdir()) == []


def test_save_then_donated_buffers_do_not_reach_the_checkpoint(tmp_path):
  @jax.jit
  def initial():
    return jnp.arange(1 << 18, dtype=jnp.float32)

  step = jax.jit(lambda x: -x - 1.0, donate_argnums=0)
  store = checkpoint.Checkpoints(tmp_path)
  x = initial()
  store.save(1, {'x': x}, {})
  for _ in range(20):
    x = step(x)
  restored, _ = store.restore(1, {'x': jax.eval_shape(initial)})
  store.close()
  np.testing.assert_array_equal(restored['x'], np.arange(1 << 18))


def test_rotation_keeps_the_newest_and_the_best_over_a_restart(tmp_path):
  success = {1: 0.2, 2: 0.9, 3: None, 4: 0.5, 5: 0.9, 6: 0.3}
  store = checkpoint.Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3):
    store.save(step, small(step), {}, success=success[step])
  store.wait()
  assert store.all_steps() == [2, 3]
  store.close()

  store = checkpoint.Checkpoints(tmp_path, keep=1)
  store.save(4, small(4), {}, success=success[4])
  store.wait()
  assert store.all_steps() == [2, 4]
  for step in (5, 6):
    store.save(step, small(step), {}, success=success[step])
  store.wait()
  assert store.all_steps() == [5, 6]  # the later of two equals
  store.close()


def test_rotation_checkpoint_without_success_is_never_the_best(tmp_path):
  store = checkpoint.Checkpoints(tmp_path, keep=1)
  kept = []
  for step, success in enumerate([None, None, 0.0, None], 1):
    store.save(step, small(step), {}, success=success)
    store.wait()
    kept.append(store.all_steps())
  store.close()
  assert kept == [[1], [2], [3], [3, 4]]


class Full:
  """Future of a write to a full disk."""

  def result(self, timeout=None):
    raise OSError(28, 'No space left on device')


def fill_the_disk(monkeypatch):
  """Make every save from now on fail in the background."""
  handler = ocp.PyTreeCheckpointHandler
  save = handler.async_save

  async def async_save(*arguments, **more):
    return [*await save(*arguments, **more), Full()]

  monkeypatch.setattr(handler, 'async_save', async_save)


def test_save_that_fails_in_the_background_is_reported_and_raised(
  tmp_path, monkeypatch
):
  fill_the_disk(monkeypatch)
  reported = queue.SimpleQueue()
  store = checkpoint.Checkpoints(tmp_path, on_failure=reported.put)
  store.save(1, small(1), {})
  error = reported.get(timeout=20)  # Before `wait`.
  with pytest.raises(OSError, match='No space') as raised:
    store.wait()
  assert raised.value is error
  assert not (tmp_path / '1').exists()


def test_save_same_step_is_declined_and_older_is_an_error(tmp_path):
  store = checkpoint.Checkpoints(tmp_path)
  assert store.save(5, small(5), {'first': True})
  assert not store.save(5, small(6), {'first': False})
  with pytest.raises(ValueError, match='step 4 is older'):
    store.save(4, small(4), {})
  state, extra = store.restore(5, small(0))
  store.close()
  assert (state['step'], extra) == (5, {'first': True})


@pytest.mark.parametrize('success', [float('nan'), 1.5, -0.1])
def test_save_success_outside_of_0_1_is_refused(tmp_path, success):
  with pytest.raises(ValueError, match='not in'):
    checkpoint.Checkpoints(tmp_path).save(1, {}, {}, success=success)


def test_restore_part_is_read_and_misfit_is_refused(tmp_path):
  store = checkpoint.Checkpoints(tmp_path)
  store.save(1, {'actor': small(1), 'critic': small(2)}, {})
  part, _ = store.restore(1, {'actor': small(0)})
  np.testing.assert_array_equal(part['actor']['a'], np.ones(4))
  with pytest.raises(ValueError, match="no 'actor.b'"):
    store.restore(1, {'actor': {'b': jnp.zeros(4)}})
  for wrong in (jnp.zeros(5, jnp.float32), jnp.zeros(4, jnp.bfloat16)):
    with pytest.raises(ValueError, match="'actor.a' is float32.4. in the ch"):
      store.restore(1, {'actor': {'a': wrong}})
  store.close()


_SAVE_FOREVER = """
import sys
import jax.numpy as jnp
from actfocus_jax.run import checkpoint
store = checkpoint.Checkpoints(sys.argv[1], keep=2)
step = store.latest_step() or 0
while True:
  step += 1
  leaf = jnp.full((1 << 18,), step, jnp.float32)
  state = {name: leaf for name in 'abcdefgh'}
  store.save(step, state, {'step': step}, success=0.5)
"""


def kill_inside_a_save(directory):
  """Start saving and kill -9 when a third save is half on disk."""
  process = subprocess.Popen(
    [sys.executable, '-c', _SAVE_FOREVER, str(directory)], cwd=ROOT
  )
  try:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
      names = [path.name for path in directory.glob('*')]
      whole = [name for name in names if name.isdigit()]
      if len(whole) >= 2 and len(names) > len(whole):
        break
  finally:
    process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL


def test_kill_9_inside_a_save_leaves_whole_checkpoints(tmp_path):
  directory = tmp_path / 'checkpoints'
  for _ in range(5):
    kill_inside_a_save(directory)
    if any('tmp' in path.name for path in directory.iterdir()):
      break
  assert any('tmp' in path.name for path in directory.iterdir())

  store = checkpoint.Checkpoints(directory)
  step = store.latest_step()
  abstract_leaf = jax.ShapeDtypeStruct((1 << 18,), jnp.float32)
  state, extra = store.restore(step, dict.fromkeys('abcdefgh', abstract_leaf))
  assert extra == {'step': step}
  for leaf in state.values():
    np.testing.assert_array_equal(leaf, np.full(1 << 18, step))
  # The next run goes on from there and removes the temporary folder.
  store.save(step + 10, state, {})
  store.close()
  assert not any('tmp' in path.name for path in directory.iterdir())
