"""The compiled step: selection, skipping, fusion, devices, compilations."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from actfocus_jax.algorithm import losses
from actfocus_jax.learner import state as state_lib
from actfocus_jax.learner import step as step_lib
from actfocus_jax.run import compilations

SGD = optax.sgd(0.5)
KEY = jax.random.key(9)


def copy(tree):
  """Buffers of its own: a step donates its state."""
  return jax.tree.map(lambda x: x + 0, tree)


def assert_equal(found, wanted):
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def largest_difference(one, other):
  return max(
    float(np.abs(np.asarray(a) - np.asarray(b)).max())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  )


@pytest.fixture(scope='module')
def half(recipe):
  """Half of the groups, in two micro-batches."""
  return recipe(ratio=0.5, minibatch=8, microbatch=4, entropy_coefficient=0.01)


@pytest.fixture(scope='module')
def adam_step(model, half):
  graphdef, _ = model
  tx = state_lib.optimizer(
    learning_rate=1e-2, b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=1.0
  )
  return tx, step_lib.TrainStep(graphdef, graphdef, tx, half)


@pytest.fixture(scope='module')
def run(adam_step, model, reference):
  """One fused step from the initial state."""
  tx, train_step = adam_step

  def one(batch, key=KEY):
    state = state_lib.create(copy(model[1]), tx)
    return train_step(state, reference, batch, key)

  return one


# --- Selection ---------------------------------------------------------------


def test_select_keeps_the_groups_with_spread(batch):
  """Groups 0 and 3: group 1 has little spread, group 2 none."""
  rows = [*range(4), *range(12, 16)]
  kept, return_PG = step_lib.select(
    jax.tree.map(jnp.asarray, batch), members=4, ratio=0.5
  )
  assert kept.group.tolist() == [0] * 4 + [3] * 4
  assert_equal(kept, jax.tree.map(lambda x: x[rows], batch))
  np.testing.assert_allclose(
    return_PG, batch.reward[rows].sum(axis=1).reshape(2, 4), rtol=1e-6
  )


def test_the_step_reads_only_the_kept_groups(run, batch):
  state, metrics = run(batch)
  assert int(metrics['selection/kept']) == 2
  dropped, kept = np.arange(4, 12), np.arange(4)

  def with_other_tokens(rows):
    tokens = batch.tokens.copy()
    tokens[rows] = np.where(batch.valid[rows], 63 - tokens[rows] // 2, 0)
    return dataclasses.replace(batch, tokens=tokens)

  same, same_metrics = run(with_other_tokens(dropped))
  assert_equal(same.params, state.params)
  assert_equal(same_metrics, metrics)
  other, _ = run(with_other_tokens(kept))
  assert largest_difference(other.params, state.params) > 1e-3


# --- One iteration -----------------------------------------------------------


def test_a_step_moves_every_parameter_and_counts(run, model, batch):
  state, metrics = run(batch)
  assert (int(state.step), int(state.skipped)) == (1, 0)
  for before, after in zip(
    jax.tree.leaves(model[1]), jax.tree.leaves(state.params), strict=True
  ):
    assert np.abs(np.asarray(after - before)).max() > 1e-4
  assert all(np.isfinite(np.asarray(value)) for value in metrics.values())
  assert float(metrics['actor/grad_norm']) > 1e-3


def test_a_step_makes_its_loss_smaller(run, adam_step, reference, batch):
  """The same batch again: the surrogate must have fallen."""
  state, before = run(batch)
  _, train_step = adam_step
  for _ in range(3):
    state, after = train_step(state, reference, batch, KEY)
  assert int(state.step) == 4
  assert float(after['actor/loss']) < float(before['actor/loss']) - 1e-2


def test_without_spread_the_state_stays_bit_for_bit(
  adam_step, run, reference, batch
):
  """Not even weight decay or the moments move; only the counters do."""
  state, _ = run(batch)  # So that moments are not zero.
  before = copy(state)
  end_BT = batch.turn_end
  assert np.abs(np.asarray(before.opt_state[1][0].mu['head'][...])).max() > 0
  level = np.where(np.cumsum(end_BT, axis=1) == 1, end_BT, False)
  equal = dataclasses.replace(
    batch, reward=np.where(level, -0.1, 0.0).astype(np.float32)
  )
  assert equal.reward.sum() != 0
  _, train_step = adam_step
  state, metrics = train_step(state, reference, equal, KEY)
  assert_equal(state.params, before.params)
  assert_equal(state.opt_state, before.opt_state)
  assert (int(state.step), int(state.skipped)) == (2, 1)
  assert int(metrics['selection/kept_with_spread']) == 0
  assert int(metrics['selection/skipped_steps']) == 1
  assert all(np.isfinite(np.asarray(value)) for value in metrics.values())


def test_two_calls_equal_the_fused_one(adam_step, run, model, reference, batch):
  tx, train_step = adam_step
  fused, fused_metrics = run(batch)
  state = state_lib.create(copy(model[1]), tx)
  weigh_key, order_key = jax.random.split(KEY)
  ready, metrics = train_step.prepare(state.params, reference, batch, weigh_key)
  state, metrics = train_step.finish(state, ready, metrics, order_key)
  assert metrics.keys() == fused_metrics.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(
      value, fused_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name
    )
  # Adam makes a step of up to the rate from any gradient, rounding too.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
    state.params,
    fused.params,
  )
  assert int(state.step) == int(fused.step) == 1


def test_eight_devices_make_the_same_step(
  model, reference, batch, recipe, spread_out
):
  """By plain gradient descent, which does not amplify rounding."""
  graphdef, params = model
  chosen = recipe(ratio=0.5, minibatch=8, microbatch=8)
  train_step = step_lib.TrainStep(graphdef, graphdef, SGD, chosen)
  one, metrics = train_step(
    state_lib.create(copy(params), SGD), reference, batch, KEY
  )
  assert largest_difference(one.params, params) > 1e-2
  mesh, place = spread_out
  with jax.set_mesh(mesh):
    placed, rows = place(copy(params), batch)
    frozen, _ = place(reference, batch)
    eight, found = train_step(
      state_lib.create(placed, SGD), frozen, rows, KEY
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5
    ),
    eight.params,
    one.params,
  )
  for name, value in metrics.items():
    np.testing.assert_allclose(
      found[name], value, rtol=1e-4, atol=1e-5, err_msg=name
    )


def test_one_compilation_for_each_length(run, batch):
  def longer(x):
    return x if x.ndim == 1 else np.pad(x, ((0, 0), (0, 8)))

  compilations.start()
  run(batch)
  before = compilations.count()
  for key in (1, 2):
    run(batch, jax.random.key(key))
  assert compilations.count() == before
  padded = dataclasses.replace(
    jax.tree.map(longer, batch),
    turn=np.pad(batch.turn, ((0, 0), (0, 8)), constant_values=-1),
  )
  run(padded)
  after = compilations.count()
  assert after == before + 1
  run(padded)
  assert compilations.count() == after


# --- Mini-batches ------------------------------------------------------------


def seen_rows(model, ready, recipe, key):
  """Labels of the rows of each micro-batch, in the order they are read."""
  seen = []

  def spy(logprob_BT, old_logprob_BT, *args, **kwargs):
    jax.debug.callback(
      lambda x: seen.append(x.tolist()), old_logprob_BT[:, 0], ordered=True
    )
    return losses.policy_loss(
      logprob_BT, old_logprob_BT, *args, clip_low=0.2, clip_high=0.2, **kwargs
    )

  graphdef, params = model
  labels = jnp.arange(16, dtype=jnp.float32)
  ready = dataclasses.replace(
    ready, old_logprob_BT=ready.old_logprob_BT.at[:, 0].set(labels)
  )
  spied = dataclasses.replace(recipe, policy_loss=spy)
  state = state_lib.create(params, SGD)
  jax.jit(
    functools.partial(step_lib.update, graphdef, SGD, recipe=spied)
  )(state, ready, key)
  jax.effects_barrier()
  return seen


def test_mini_batches_are_a_partition_of_the_rows(model, batch, recipe, weigh):
  ready, _ = weigh(batch, recipe())
  assert not batch.sampled[:, 0].any()  # So labels there change nothing.
  twice = recipe(minibatch=8, microbatch=4, epochs=2)
  seen = seen_rows(model, ready, twice, KEY)
  assert [len(rows) for rows in seen] == [4] * 8
  epochs = sum(seen[:4], []), sum(seen[4:], [])
  for epoch in epochs:
    assert collections.Counter(epoch) == collections.Counter(range(16))
  assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
  other = seen_rows(model, ready, twice, jax.random.key(10))
  assert sum(other[:4], []) != epochs[0]


def test_update_makes_one_optimizer_step_per_mini_batch(
  model, batch, recipe, weigh, gradient
):
  """Two mini-batches by hand: the second sees what the first has changed."""
  graphdef, params = model
  chosen = recipe(minibatch=8, microbatch=8)
  ready, _ = weigh(batch, chosen)
  state = state_lib.create(params, optax.trace(0.0))
  tx = optax.chain(optax.trace(1.0), optax.scale(-0.5))
  state = state_lib.create(params, tx)
  update = jax.jit(functools.partial(step_lib.update, graphdef, tx))
  after, _ = jax.jit(
    functools.partial(step_lib.update, graphdef, tx, recipe=chosen)
  )(state, ready, KEY)
  del update
  (rows,) = [seen_rows(model, ready, chosen, KEY)]
  by_hand, trace = params, None
  for labels in rows:
    part = jax.tree.map(lambda x, i=np.array(labels, int): x[i], ready)
    grads, _ = gradient(part, chosen, by_hand)
    trace = grads if trace is None else jax.tree.map(jnp.add, trace, grads)
    by_hand = jax.tree.map(lambda p, g: p - 0.5 * g, by_hand, trace)
  assert largest_difference(by_hand, params) > 1e-2
  assert largest_difference(by_hand, after.params) < 1e-4
