"""The optimizer: what it decays, clips and warms up; the fresh state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from actfocus_jax.learner import state as state_lib
from actfocus_jax.parallel import mesh as mesh_lib

pytestmark = pytest.mark.usefixtures('optax_promotes')

PLAIN = dict(
  learning_rate=0.1, b1=0.9, b2=0.99, weight_decay=0.0, clip_norm=1e9
)


def update(tx, params, *gradients):
  """The last of the updates that the gradients give in turn."""
  state, step = tx.init(params), jax.jit(tx.update)
  for grads in gradients:
    updates, state = step(grads, state, params)
  return updates


def test_matrices_decay_and_vectors_do_not(model):
  """Stacked norms and biases have two axes, and still are vectors."""
  _, params = model
  tx = state_lib.optimizer(**PLAIN | {'weight_decay': 0.5})
  updates = update(tx, params, jax.tree.map(jnp.zeros_like, params))
  decayed = {}
  for (path, change), value in zip(
    jax.tree_util.tree_leaves_with_path(updates),
    jax.tree.leaves(params),
    strict=True,
  ):
    name = mesh_lib.path_name(path)
    decayed[name] = bool(change.any())
    if decayed[name]:
      np.testing.assert_allclose(change, -0.1 * 0.5 * value, rtol=1e-5)
    assert value.ndim >= 2 or not name.startswith('layers')
  linear = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
  matrices = {'embedding', 'head', *(f'layers/{n}/kernel' for n in linear)}
  vectors = {
    'norm/scale',
    'layers/attention_norm/scale',
    'layers/mlp_norm/scale',
    *(f'layers/{n}/bias' for n in 'qkv'),
  }
  assert {name for name, is_decayed in decayed.items() if is_decayed} == (
    matrices
  )
  assert decayed.keys() == matrices | vectors


def test_the_whole_gradient_is_clipped_before_adam():
  """Norm 50 clipped to 5 is the gradient (3, 4) at either rate."""
  params = {'a': jnp.zeros((1, 1)), 'b': jnp.zeros((1, 1))}

  def gradient(a, b):
    return {'a': jnp.full((1, 1), a), 'b': jnp.full((1, 1), b)}

  tx = state_lib.optimizer(**PLAIN | {'clip_norm': 5.0})
  small = gradient(1.0, 1.0)
  clipped = update(tx, params, small, gradient(30.0, 40.0))
  by_hand = update(tx, params, small, gradient(3.0, 4.0))
  unclipped = update(
    state_lib.optimizer(**PLAIN), params, small, gradient(30.0, 40.0)
  )
  assert abs(float(clipped['a'][0, 0] - unclipped['a'][0, 0])) > 1e-3
  for name in params:
    np.testing.assert_allclose(clipped[name], by_hand[name], rtol=1e-5)


def test_the_rate_rises_and_the_first_step_moves():
  params = {'w': jnp.zeros((1, 1))}
  grads = {'w': jnp.ones((1, 1))}
  tx = state_lib.optimizer(**PLAIN, warmup_steps=4)
  sizes = [
    -float(update(tx, params, *[grads] * n)['w'][0, 0]) for n in range(1, 7)
  ]
  np.testing.assert_allclose(
    sizes, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], atol=1e-5
  )


def test_a_fresh_state(model):
  _, params = model
  actor = state_lib.create_model_state(params, state_lib.optimizer(**PLAIN))
  state = state_lib.create(actor)
  counts = state.step, state.skipped, state.streak
  assert [int(x) for x in counts] == [0, 0, 0] and state.critic is None
  # Donated, so none may be another's buffer.
  assert len({x.unsafe_buffer_pointer() for x in counts}) == 3
  moments = optax.tree.get(state.actor.opt_state, 'mu')
  assert jax.tree.structure(moments) == jax.tree.structure(params)
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(moments))
