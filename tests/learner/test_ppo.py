"""The critic beside the policy: its gradient, its steps, its warm-up."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from actfocus_jax.algorithm import estimators
from actfocus_jax.learner import state as state_lib
from actfocus_jax.learner import train_step as step_lib
from actfocus_jax.model import architecture, transformer
from actfocus_jax.parallel import mesh as mesh_lib

SLOW = optax.sgd(0.05)


@pytest.fixture(scope='module', autouse=True)
def one_device():
  with jax.set_mesh(mesh_lib.make_mesh(devices=jax.devices()[:1])):
    yield


@pytest.fixture(scope='module')
def critic(model):
  """(graphdef, params) of a critic whose head is not zero."""
  config = architecture.Config(
    64, 32, 48, 2, 2, 1, 16, rope_theta=100.0, tie_word_embeddings=False
  )
  graphdef, shapes = transformer.abstract(config, jnp.float32, is_critic=True)
  params = transformer.critic_from(model[1], shapes)
  head = 0.3 * jax.random.normal(jax.random.key(4), (32,))
  params['value_head'][...] = head
  return graphdef, params


@pytest.fixture(scope='module')
def ppo(step_config):
  return functools.partial(
    step_config,
    algo='ppo',
    advantage__gae__discount=0.99,
    advantage__gae__lam=0.95,
    critic__clip=0.2,
  )


@pytest.fixture(scope='module')
def minibatch(batch, prepared, ppo, critic):
  """The critic has moved since: its values are not those before the update."""
  made, _ = prepared(batch, ppo(), critic)
  noise_BT = jax.random.normal(jax.random.key(3), made.old_value_BT.shape)
  old_value_BT = made.old_value_BT + 0.3 * noise_BT
  return dataclasses.replace(made, old_value_BT=old_value_BT)


@pytest.fixture(scope='module')
def critic_gradient(critic):
  compiled = jax.jit(
    step_lib.critic_gradient, static_argnames=('graphdef', 'config')
  )
  return lambda minibatch, step_config: compiled(
    *critic, minibatch, config=step_config
  )


def largest_difference(one, other):
  return max(
    float(np.abs(np.asarray(a) - np.asarray(b)).max())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  )


def copy(tree):
  return jax.tree.map(lambda x: x + 0, tree)


# --- The gradient ------------------------------------------------------------


def test_micro_batches_give_the_same_gradient(minibatch, ppo, critic_gradient):
  wanted, metrics = critic_gradient(minibatch, ppo())
  assert largest_difference(wanted, jax.tree.map(jnp.zeros_like, wanted)) > 1e-2
  grads, found = critic_gradient(minibatch, ppo(learner__microbatch=2))
  assert largest_difference(grads, wanted) < 1e-5
  for name, x in metrics.items():
    np.testing.assert_allclose(found[name], x, rtol=1e-4, err_msg=name)


def test_critic_gradient_ignores_what_is_off_the_mask(
  minibatch, ppo, critic_gradient
):
  wanted, _ = critic_gradient(minibatch, ppo())
  off_BT = ~minibatch.critic_BT
  loud = dataclasses.replace(
    minibatch,
    return_BT=jnp.where(off_BT, 99.0, minibatch.return_BT),
    old_value_BT=jnp.where(off_BT, -9.0, minibatch.old_value_BT),
    tokens_BT=jnp.where(minibatch.valid_BT, minibatch.tokens_BT, 5),
  )
  found, _ = critic_gradient(loud, ppo())
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


# --- A whole step ------------------------------------------------------------


def stepper(model, config, critic=None):
  """(TrainStep, fresh state), with or without a critic."""
  actor, judge = (
    m and state_lib.create_model_state(copy(m[1]), SLOW)
    for m in (model, critic)
  )
  train_step = step_lib.TrainStep(
    step_lib.Learner(model[0], SLOW),
    config,
    critic=critic and step_lib.Learner(critic[0], SLOW),
  )
  return train_step, state_lib.create(actor, judge)


def test_step_moves_both_and_critic_learns(
  model, critic, reference, batch, ppo
):
  train_step, state = stepper(model, ppo(), critic)
  state, metrics = train_step.fused(state, reference, batch, jax.random.key(0))
  assert largest_difference(state.actor.params, model[1]) > 1e-4
  assert largest_difference(state.critic.params, critic[1]) > 1e-4
  assert all(np.isfinite(np.asarray(x)) for x in metrics.values())
  for _ in range(8):
    state, later = train_step.fused(state, reference, batch, jax.random.key(0))
  assert float(later['critic/loss']) < 0.9 * float(metrics['critic/loss'])
  assert (
    later['critic/explained_variance'] > metrics['critic/explained_variance']
  )


def test_critic_warmup_with_a_skipped_step_counts_updates_only(
  model, critic, reference, batch, ppo
):
  """A step without an update teaches the critic nothing."""
  chosen = dataclasses.replace(ppo(critic__warmup=1), needs_spread=True)
  train_step, state = stepper(model, chosen, critic)
  flat = dataclasses.replace(batch, reward=np.zeros_like(batch.reward))
  key = jax.random.key(0)
  state, _ = train_step.fused(state, reference, flat, key)
  assert (int(state.step), int(state.skipped)) == (1, 1)
  state, _ = train_step.fused(state, reference, batch, key)
  assert largest_difference(state.actor.params, model[1]) == 0
  assert largest_difference(state.critic.params, critic[1]) > 1e-4
  state, _ = train_step.fused(state, reference, batch, key)
  assert largest_difference(state.actor.params, model[1]) > 1e-4


def test_without_spread_ppo_still_learns(model, critic, reference, batch, ppo):
  """Groups need no spread where a critic is the baseline."""
  equal = dataclasses.replace(
    batch, reward=np.where(batch.turn == 0, batch.turn_end, 0).astype('f4')
  )
  for needs_spread in (True, False):
    chosen = dataclasses.replace(ppo(), needs_spread=needs_spread)
    train_step, state = stepper(model, chosen, critic)
    state, _ = train_step.fused(state, reference, equal, jax.random.key(0))
    moved = largest_difference(state.critic.params, critic[1]) > 1e-5
    assert moved != needs_spread
    assert int(state.streak) == int(needs_spread)


# --- Other terms of the loss -------------------------------------------------


def test_without_a_need_for_it_the_reference_may_be_none(
  model, batch, step_config, reference
):
  """The same step as with a reference that changes nothing."""
  without = step_config(weights='uniform')
  assert not without.has_reference and not without.has_signal
  unused = dataclasses.replace(without, has_reference=True, has_signal=True)
  results = []
  for chosen, frozen in ((without, None), (unused, reference)):
    train_step, state = stepper(model, chosen)
    results.append(train_step.fused(state, frozen, batch, jax.random.key(0)))
  (one, metrics), (other, others) = results
  assert largest_difference(one.actor.params, other.actor.params) == 0
  assert 'signal/mean' in others and 'signal/mean' not in metrics


# --- Steps without anything to learn -----------------------------------------


def _ones(inputs):
  return estimators.Credit(inputs.sampled_BT.astype(jnp.float32))


@pytest.mark.parametrize('compares_turns', [False, True])
def test_equal_returns_are_learned_from_if_turns_are_compared(
  model, reference, batch, step_config, compares_turns
):
  flat = dataclasses.replace(batch, reward=np.zeros_like(batch.reward))
  chosen = dataclasses.replace(
    step_config(),
    estimator=estimators.Estimator(_ones, 'grpo', compares_turns),
    advantage={},
  )
  train_step, state = stepper(model, chosen)
  state, _ = train_step.fused(state, reference, flat, jax.random.key(0))
  assert int(state.skipped) == (not compares_turns)
