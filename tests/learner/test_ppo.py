"""The critic beside the policy: its gradient, its steps, and who moves when."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from actfocus_jax.algorithm import estimators, losses
from actfocus_jax.learner import stages
from actfocus_jax.learner import state as state_lib
from actfocus_jax.learner import step as step_lib
from actfocus_jax.learner import update as update_lib
from actfocus_jax.model import architecture, scoring, transformer
from actfocus_jax.parallel import mesh as mesh_lib

SLOW = optax.sgd(0.05)
GAE = functools.partial(estimators.gae, discount=0.99, lam=0.95)


@pytest.fixture(scope='module', autouse=True)
def one_device():
  with jax.set_mesh(mesh_lib.make_mesh(devices=jax.devices()[:1])):
    yield


@pytest.fixture(scope='module')
def critic(model):
  """(graphdef, params) of a critic whose head is not zero."""
  config = model[0].config if hasattr(model[0], 'config') else None
  config = config or architecture.Config(
    64, 32, 48, 2, 2, 1, 16, rope_theta=100.0, tie_word_embeddings=False
  )
  graphdef, shapes = transformer.abstract(config, jnp.float32, is_critic=True)
  params = transformer.critic_from(model[1], shapes)
  head = 0.3 * jax.random.normal(jax.random.key(4), (32,))
  params['value_head'][...] = head
  return graphdef, params


@pytest.fixture(scope='module')
def ppo(recipe):
  return functools.partial(
    recipe,
    advantage=GAE,
    value_loss=functools.partial(losses.value_loss, clip=0.2),
    needs_spread=False,
  )


@pytest.fixture(scope='module')
def value(critic):
  return jax.jit(functools.partial(scoring.value_tokens, critic[0]))


@pytest.fixture(scope='module')
def ready(batch, weigh, ppo, critic, value):
  """The critic has moved since: its values are not those before the update."""
  value_BT = value(critic[1], batch.tokens, batch.valid)
  ready, _ = weigh(batch, ppo(), value_BT)
  noise_BT = jax.random.normal(jax.random.key(3), value_BT.shape)
  return dataclasses.replace(ready, old_value_BT=value_BT + 0.3 * noise_BT)


@pytest.fixture(scope='module')
def critic_gradient(critic):
  compiled = jax.jit(
    update_lib.critic_gradient, static_argnames=('graphdef', 'recipe')
  )
  return lambda ready, recipe, params=None: compiled(
    critic[0], critic[1] if params is None else params, ready, recipe=recipe
  )


def largest_difference(one, other):
  return max(
    float(np.abs(np.asarray(a) - np.asarray(b)).max())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  )


def copy(tree):
  return jax.tree.map(lambda x: x + 0, tree)


# --- The gradient ------------------------------------------------------------


def test_the_loss_is_that_of_a_loop(
  ready, batch, ppo, critic, value, critic_gradient
):
  value_BT = np.asarray(value(critic[1], batch.tokens, batch.valid), np.float64)
  total, count, clipped = 0.0, 0, 0
  for b, t in np.argwhere(batch.sampled):
    old, goal = float(ready.old_value_BT[b, t]), float(ready.return_BT[b, t])
    free = (value_BT[b, t] - goal) ** 2
    near = min(max(value_BT[b, t], old - 0.2), old + 0.2)
    total += 0.5 * max(free, (near - goal) ** 2)
    clipped += (near - goal) ** 2 > free
    count += 1
  _, metrics = critic_gradient(ready, ppo())
  assert 0 < clipped < count
  np.testing.assert_allclose(metrics['critic/loss'], total / count, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['critic/clip_fraction'], clipped / count, rtol=1e-5
  )


def test_the_gradient_is_that_of_the_loss(ready, ppo, critic, critic_gradient):
  """Along a random direction, by central differences."""
  grads, _ = critic_gradient(ready, ppo())
  keys = iter(jax.random.split(jax.random.key(1), 99))
  direction = jax.tree.map(
    lambda x: jax.random.normal(next(keys), x.shape), critic[1]
  )
  ahead, behind = (
    critic_gradient(
      ready,
      ppo(),
      jax.tree.map(lambda p, d, h=h: p + h * d, critic[1], direction),
    )[1]['critic/loss']
    for h in (1e-3, -1e-3)
  )
  slope = sum(
    float(jnp.vdot(g, d))
    for g, d in zip(
      jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True
    )
  )
  assert abs(slope) > 1e-2
  np.testing.assert_allclose((ahead - behind) / 2e-3, slope, rtol=2e-2)


@pytest.mark.parametrize('rows', [8, 2])
def test_micro_batches_give_the_same_gradient(
  rows, ready, ppo, critic_gradient
):
  wanted, metrics = critic_gradient(ready, ppo())
  grads, found = critic_gradient(ready, ppo(microbatch=rows))
  assert largest_difference(grads, wanted) < 1e-5
  for name, x in metrics.items():
    np.testing.assert_allclose(found[name], x, rtol=1e-4, err_msg=name)


def test_what_is_off_the_mask_has_no_say(ready, ppo, critic_gradient):
  wanted, _ = critic_gradient(ready, ppo())
  off_BT = ~ready.critic_BT
  loud = dataclasses.replace(
    ready,
    return_BT=jnp.where(off_BT, 99.0, ready.return_BT),
    old_value_BT=jnp.where(off_BT, -9.0, ready.old_value_BT),
    tokens_BT=jnp.where(ready.valid_BT, ready.tokens_BT, 5),
  )
  found, _ = critic_gradient(loud, ppo())
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


# --- A whole step ------------------------------------------------------------


def stepper(model, critic, recipe):
  return step_lib.TrainStep(
    step_lib.Learner(model[0], SLOW),
    recipe,
    critic=step_lib.Learner(critic[0], SLOW),
  )


def start(model, critic):
  actor, judge = (state_lib.trained(copy(p[1]), SLOW) for p in (model, critic))
  return state_lib.create(actor, judge)


def test_both_move_and_explain_themselves(model, critic, reference, batch, ppo):
  train_step = stepper(model, critic, ppo())
  state, metrics = train_step.fused(
    start(model, critic), reference, batch, jax.random.key(0)
  )
  assert largest_difference(state.actor.params, model[1]) > 1e-4
  assert largest_difference(state.critic.params, critic[1]) > 1e-4
  assert all(np.isfinite(np.asarray(x)) for x in metrics.values())
  for _ in range(8):
    state, later = train_step.fused(state, reference, batch, jax.random.key(0))
  assert float(later['critic/loss']) < 0.9 * float(metrics['critic/loss'])
  assert (
    later['critic/explained_variance'] > metrics['critic/explained_variance']
  )


def test_the_critic_learns_alone_at_first(model, critic, reference, batch, ppo):
  train_step = stepper(model, critic, ppo(critic_warmup=1))
  state = start(model, critic)
  state, _ = train_step.fused(state, reference, batch, jax.random.key(0))
  assert largest_difference(state.actor.params, model[1]) == 0
  assert largest_difference(state.critic.params, critic[1]) > 1e-4
  state, _ = train_step.fused(state, reference, batch, jax.random.key(0))
  assert largest_difference(state.actor.params, model[1]) > 1e-4


def test_critic_warmup_with_a_skipped_step_counts_updates_only(
  model, critic, reference, batch, ppo
):
  """A step without an update teaches the critic nothing."""
  train_step = stepper(model, critic, ppo(critic_warmup=1, needs_spread=True))
  flat = dataclasses.replace(batch, reward=np.zeros_like(batch.reward))
  key = jax.random.key(0)
  state, _ = train_step.fused(start(model, critic), reference, flat, key)
  assert (int(state.step), int(state.skipped)) == (1, 1)
  state, _ = train_step.fused(state, reference, batch, key)
  assert largest_difference(state.actor.params, model[1]) == 0
  assert largest_difference(state.critic.params, critic[1]) > 1e-4
  state, _ = train_step.fused(state, reference, batch, key)
  assert largest_difference(state.actor.params, model[1]) > 1e-4


def test_eight_devices_make_the_same_step(
  model, critic, reference, batch, ppo, spread_out
):
  recipe = ppo(microbatch=8)
  wanted, wanted_metrics = stepper(model, critic, recipe).fused(
    start(model, critic), reference, batch, jax.random.key(0)
  )
  mesh, place = spread_out
  actor, rows = place(copy(model[1]), batch)
  judge, _ = place(copy(critic[1]), batch)
  frozen, _ = place(reference, batch)
  with jax.set_mesh(mesh):
    state = state_lib.create(
      state_lib.trained(actor, SLOW), state_lib.trained(judge, SLOW)
    )
    found, metrics = stepper(model, critic, recipe).fused(
      state, frozen, rows, jax.random.key(0)
    )
  assert largest_difference(found.actor.params, wanted.actor.params) < 2e-5
  assert largest_difference(found.critic.params, wanted.critic.params) < 2e-5
  for name, x in wanted_metrics.items():
    np.testing.assert_allclose(
      metrics[name], x, rtol=1e-3, atol=1e-5, err_msg=name
    )


def test_without_spread_ppo_still_learns(model, critic, reference, batch, ppo):
  """Groups need no spread where a critic is the baseline."""
  equal = dataclasses.replace(
    batch, reward=np.where(batch.turn == 0, batch.turn_end, 0).astype('f4')
  )
  for needs_spread in (True, False):
    train_step = stepper(model, critic, ppo(needs_spread=needs_spread))
    state, metrics = train_step.fused(
      start(model, critic), reference, equal, jax.random.key(0)
    )
    moved = largest_difference(state.critic.params, critic[1]) > 1e-5
    assert moved != needs_spread
    assert int(state.streak) == int(needs_spread)


# --- What else may be in the loss --------------------------------------------


def test_kl_is_added_to_the_loss(batch, recipe, weigh, gradient, score, model):
  """At the reference itself k3 and its gradient are 0."""
  plain, with_kl = recipe(), recipe(kl_coefficient=0.5, kl_estimator='k3')
  ready, _ = weigh(batch, with_kl)
  assert weigh(batch, plain)[0].ref_logprob_BT is None
  wanted, without = gradient(ready, plain)
  grads, metrics = gradient(ready, with_kl)
  now_BT = score(*model, batch.tokens, batch.valid).raw_logprob_BT
  d = np.asarray(now_BT - ready.ref_logprob_BT, np.float64)[batch.sampled]
  k3 = np.clip(np.exp(-d) - 1 + d, -10, 10).mean()
  np.testing.assert_allclose(metrics['actor/kl'], k3, rtol=1e-4)
  np.testing.assert_allclose(
    metrics['actor/loss'], without['actor/loss'] + 0.5 * k3, rtol=1e-4
  )
  assert largest_difference(grads, wanted) > 1e-3
  at_home = dataclasses.replace(ready, ref_logprob_BT=now_BT)
  found, metrics = gradient(at_home, with_kl)
  assert abs(float(metrics['actor/kl'])) < 1e-6
  assert largest_difference(found, wanted) < 1e-5


def test_importance_weights_reach_the_loss(batch, recipe, weigh, gradient):
  capped = recipe(rescore=True, importance_cap=1.5)
  ready, metrics = weigh(batch, capped)
  assert 0 < float(metrics['rollout/effective_sample_size']) < 1
  assert float(ready.importance_BT.max()) == 1.5
  plain = dataclasses.replace(ready, importance_BT=None)
  ones = dataclasses.replace(
    ready, importance_BT=jnp.ones_like(ready.weight_BT)
  )
  wanted = gradient(plain, recipe(rescore=True))[0]
  assert largest_difference(gradient(ones, capped)[0], wanted) < 1e-6
  assert largest_difference(gradient(ready, capped)[0], wanted) > 1e-4


def test_top_p_takes_tokens_out_and_keeps_rows(batch, recipe):
  rows = jax.tree.map(jnp.asarray, batch)
  kept, return_PG = stages.select(rows, members=4, ratio=0.6, rule='top_p')
  assert kept.tokens.shape == rows.tokens.shape and return_PG.shape == (4, 4)
  by_group = np.asarray(kept.sampled).reshape(4, -1).any(axis=1)
  assert by_group.any() and not by_group.all() and not by_group[2]
  np.testing.assert_array_equal(
    kept.sampled[np.repeat(by_group, 4)], rows.sampled[np.repeat(by_group, 4)]
  )
  assert not (kept.action & ~kept.sampled).any()


def test_without_a_question_the_reference_is_not_needed(
  model, batch, recipe, reference
):
  """None in its place; the same step as with one that has no say."""
  quiet = recipe(alpha=1.0, beta=0.0, has_reference=False, has_signal=False)
  loud = recipe(alpha=1.0, beta=0.0)
  results = []
  for chosen, frozen in ((quiet, None), (loud, reference)):
    train_step = step_lib.TrainStep(step_lib.Learner(model[0], SLOW), chosen)
    state = state_lib.create(state_lib.trained(copy(model[1]), SLOW))
    results.append(train_step.fused(state, frozen, batch, jax.random.key(0)))
  (one, metrics), (other, others) = results
  assert largest_difference(one.actor.params, other.actor.params) == 0
  assert 'signal/mean' in others and 'signal/mean' not in metrics


# --- Steps and mini-batches without anything to learn ------------------------


def test_a_mini_batch_without_a_token_moves_nothing(optax_promotes):
  """Not even by momentum and weight decay."""
  tx = optax.adamw(0.1, weight_decay=0.5)
  trained = state_lib.trained({'w': jnp.ones(3)}, tx)

  def gradient(params, minibatch):
    del minibatch
    return {'w': jnp.zeros_like(params['w'])}, {}

  def step(sampled):
    part = types.SimpleNamespace(sampled_BT=jnp.full((2, 4), sampled))
    return update_lib.step(
      trained, part, tx=tx, gradient=gradient, name='actor'
    )

  still, _ = step(False)
  jax.tree.map(np.testing.assert_array_equal, still, trained)
  moved, _ = step(True)
  assert float(jnp.abs(moved.params['w'] - 1).max()) > 0.01


@pytest.mark.parametrize('compares_turns', [False, True])
def test_advantages_within_equal_returns(
  model, reference, batch, recipe, compares_turns
):
  """An estimator that tells turns apart learns where returns are equal."""
  flat = dataclasses.replace(batch, reward=np.zeros_like(batch.reward))
  chosen = recipe(advantage=_ones, compares_turns=compares_turns)
  train_step = step_lib.TrainStep(step_lib.Learner(model[0], SLOW), chosen)
  state = state_lib.create(state_lib.trained(copy(model[1]), SLOW))
  state, _ = train_step.fused(state, reference, flat, jax.random.key(0))
  assert int(state.skipped) == (not compares_turns)


def _ones(**said):
  return estimators.Credit(said['sampled_BT'].astype(jnp.float32))
