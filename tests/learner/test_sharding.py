"""Placement of every array of the state; no mesh changes the update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from actfocus_jax.learner import state as state_lib
from actfocus_jax.learner import train_step as step_lib
from actfocus_jax.model import architecture, transformer
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.run import checkpoint

# Wide enough for eight devices; 2 key heads, as Qwen2.5 has: over 8 devices a
# quarter of a head each.
CONFIG = architecture.Config(
  64, 64, 96, 2, 4, 2, 16, rope_theta=100.0, tie_word_embeddings=False
)
SHAPES = {
  **{f'fsdp{n}tensor{8 // n}': (1, n, 8 // n) for n in (1, 2, 4, 8)},
  'data2fsdp2tensor2': (2, 2, 2),
}
LARGE = 1024  # a leaf of more numbers must be split
# Adam's moments; the large eps makes its step go with the gradient, where it
# would make much of a rounding error.
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.3, eps=1.0))


def mesh_of(name):
  return mesh_lib.make_mesh(
    **dict(zip(mesh_lib.AXES, SHAPES[name], strict=True))
  )


def fresh(mesh):
  """(TrainStep learners, a PPO state on the mesh), the critic's head not 0."""
  graphdef, params = transformer.create(
    CONFIG, mesh, jax.random.key(0), dtype=jnp.float32
  )
  critic, shapes = transformer.abstract(CONFIG, jnp.float32, is_critic=True)
  judge = transformer.critic_from(params, shapes)
  judge['value_head'][...] += jnp.linspace(-1, 1, CONFIG.hidden_size)
  state = state_lib.create(
    state_lib.create_model_state(params, TX),
    state_lib.create_model_state(judge, TX),
  )
  return step_lib.Learner(graphdef, TX), step_lib.Learner(critic, TX), state


@pytest.fixture(scope='module')
def step(batch, step_config):
  """One PPO step from the fresh state: (state before, after, metrics)."""

  def run(mesh):
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion('standard'):
      actor, judge, state = fresh(mesh)
      chosen = step_config(
        algo='ppo',
        learner__minibatch=8,
        selection__ratio=0.5,
        advantage__gae__discount=0.99,
        advantage__gae__lam=0.95,
        critic__clip=0.2,
      )
      stepper = step_lib.TrainStep(actor, chosen, critic=judge)
      frozen = jax.tree.map(lambda x: 1.1 * x, state.actor.params)
      before = jax.tree.map(jnp.copy, state)  # The step donates its state.
      rows = mesh_lib.put_rows(mesh, batch)
      return before, *stepper.fused(state, frozen, rows, jax.random.key(9))

  return run


def not_split(tree):
  """Names of the large leaves that some device holds more than its part of."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = mesh_lib.path_name(path)
    if leaf.size < LARGE or name.endswith('norm/scale'):
      continue
    mesh = leaf.sharding.mesh.shape
    parts = mesh['fsdp'] * mesh['tensor']
    if np.prod(leaf.sharding.shard_shape(leaf.shape)) != leaf.size // parts:
      yield f'{name}: {leaf.sharding.spec}'


def unlike_parameter(model):
  """Names of the optimizer's moments that lie elsewhere than the parameter."""
  where = {
    mesh_lib.path_name(path): leaf.sharding
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
  }
  moments = jax.tree_util.tree_leaves_with_path(model.opt_state)
  found = 0
  for path, leaf in moments:
    name = mesh_lib.path_name(path)
    of = next((n for n in where if name.endswith(f'/{n}')), None)
    found += of is not None
    if of and not leaf.sharding.is_equivalent_to(where[of], leaf.ndim):
      yield f'{name}: {leaf.sharding}'
  assert found == 2 * len(where)  # Adam's first and second


def assert_placed(state):
  assert list(not_split(state)) == []
  for model in (state.actor, state.critic):
    assert list(unlike_parameter(model)) == []


def restored(state, folder):
  """The state after a way through a checkpoint."""
  checkpoints = checkpoint.Checkpoints(folder)
  checkpoints.save(1, state, {})
  actor, critic = (
    state_lib.abstract_model_state(jax.tree.map(abstract, x.params), TX)
    for x in (state.actor, state.critic)
  )
  again, _ = checkpoints.restore(1, state_lib.abstract(actor, critic))
  checkpoints.close()
  return again


def abstract(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def same(found, wanted, **tolerance):
  paths = jax.tree_util.tree_leaves_with_path(wanted)
  for (path, value), other in zip(paths, jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(
      other, value, err_msg=jax.tree_util.keystr(path), **tolerance
    )


@pytest.fixture(scope='module')
def alone(step):
  """The step on one device."""
  return jax.device_get(step(mesh_lib.make_mesh(devices=jax.devices()[:1])))


def assert_same_update(found, wanted):
  """Two (state before, after, metrics), to float tolerance."""
  (_, state, metrics), (before, wanted, wanted_metrics) = found, wanted
  for name in ('actor', 'critic'):
    moved = jax.tree.map(
      lambda a, b: np.abs(a - b).max(),
      getattr(before, name).params,
      getattr(wanted, name).params,
    )
    assert min(jax.tree.leaves(moved)) > 1e-5
  same(state, wanted, rtol=0, atol=1e-5)
  same(metrics, wanted_metrics, rtol=1e-4, atol=1e-5)
  assert float(metrics['actor/grad_norm']) > 1e-3


QUICK = ('fsdp2tensor4', 'data2fsdp2tensor2')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in SHAPES
  ],
)
def test_every_mesh_makes_the_same_update(name, step, alone, tmp_path):
  """Of PPO; and nothing is replicated by accident on the way.

  Fresh, stepped, and restored from a checkpoint.
  """
  before, after, metrics = step(mesh_of(name))
  assert len(jax.tree.leaves(before)) > 90
  assert_same_update((before, after, metrics), alone)
  for state in (before, after, restored(after, tmp_path)):
    assert_placed(state)
