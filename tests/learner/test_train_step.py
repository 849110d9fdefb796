"""The compiled step: selection, skipping, fusion, devices, compilations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from actfocus_jax.algorithm import signals
from actfocus_jax.learner import prepare as prepare_lib
from actfocus_jax.learner import state as state_lib
from actfocus_jax.learner import train_step as step_lib
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.run import metrics as metrics_lib

# Momentum and decay as AdamW has them, but a step in proportion to the
# gradient: Adam's first step makes much of a rounding error.
MOMENTUM = optax.chain(
  optax.clip_by_global_norm(1.0),
  optax.trace(0.9),
  optax.add_decayed_weights(0.01),
  optax.scale(-0.3),
)


def key_of(seed=9):
  """Made where it is used: a key's type names the mesh it was made under."""
  return jax.random.key(seed)


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


@pytest.fixture(scope='module', autouse=True)
def one_device():
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    yield


def signal(inputs):
  """Depends on the reference and on the key."""
  return signals.random(inputs) + signals.reference_energy(inputs)


@pytest.fixture(scope='module')
def half(step_config):
  """Half of the groups, in two micro-batches."""
  return half_in(step_config, 4)


def half_in(step_config, microbatch):
  chosen = step_config(
    selection__ratio=0.5,
    learner__minibatch=8,
    learner__microbatch=microbatch,
  )
  return dataclasses.replace(chosen, signal=signal)


@pytest.fixture(scope='module')
def train_step(model, half):
  graphdef, _ = model
  return step_lib.TrainStep(step_lib.Learner(graphdef, MOMENTUM), half)


@pytest.fixture
def fresh(model):
  return state_lib.create(
    state_lib.create_model_state(copy(model[1]), MOMENTUM)
  )


@pytest.fixture(scope='module')
def run(train_step, model, reference):
  """One step from the initial state."""

  def one(batch):
    state = state_lib.create(
      state_lib.create_model_state(copy(model[1]), MOMENTUM)
    )
    return train_step.fused(state, reference, batch, key_of())

  return one


def assert_same_step(found, wanted):
  """Two (state, metrics), to float tolerance."""
  (found, found_metrics), (wanted, wanted_metrics) = found, wanted
  assert largest_difference(found.actor.params, wanted.actor.params) < 2e-5
  assert (int(found.step), int(found.skipped)) == (1, 0)
  assert found_metrics.keys() == wanted_metrics.keys()
  for name, value in wanted_metrics.items():
    np.testing.assert_allclose(
      found_metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name
    )


def shardings(state):
  """Index of the piece that the last device holds, of every array."""
  device = jax.devices()[-1]
  return [
    x.sharding.devices_indices_map(x.shape)[device]
    for x in jax.tree.leaves((state.actor, state.critic))
  ]


# --- Selection ---------------------------------------------------------------


def test_select_keeps_the_groups_with_spread(batch):
  """Groups 0 and 3: group 1 has little spread, group 2 none."""
  rows = [*range(4), *range(12, 16)]
  kept, return_PG = prepare_lib.select(
    jax.tree.map(jnp.asarray, batch), members=4, ratio=0.5
  )
  assert kept.group.tolist() == [0] * 4 + [3] * 4
  assert_equal(kept, jax.tree.map(lambda x: x[rows], batch))
  np.testing.assert_allclose(
    return_PG, batch.reward[rows].sum(axis=1).reshape(2, 4), rtol=1e-6
  )


def test_top_p_takes_tokens_out_and_keeps_rows(batch):
  rows = jax.tree.map(jnp.asarray, batch)
  kept, return_PG = prepare_lib.select(rows, members=4, ratio=0.6, rule='top_p')
  assert kept.tokens.shape == rows.tokens.shape and return_PG.shape == (4, 4)
  by_group = np.asarray(kept.sampled).reshape(4, -1).any(axis=1)
  assert by_group.any() and not by_group.all() and not by_group[2]
  np.testing.assert_array_equal(
    kept.sampled[np.repeat(by_group, 4)], rows.sampled[np.repeat(by_group, 4)]
  )
  assert not (kept.action & ~kept.sampled).any()


# --- One iteration -----------------------------------------------------------


def test_steps_move_every_parameter_and_make_their_loss_smaller(
  run, train_step, model, reference, batch
):
  """The same batch again: the surrogate must fall."""
  state, before = run(batch)
  assert (int(state.step), int(state.skipped)) == (1, 0)
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), model[1], state.actor.params
  )
  assert min(jax.tree.leaves(moved)) > 1e-4
  assert all(np.isfinite(np.asarray(value)) for value in before.values())
  for _ in range(3):
    state, after = train_step.fused(state, reference, batch, key_of())
  assert int(state.step) == 4
  assert float(after['actor/loss']) < float(before['actor/loss']) - 1e-2


def test_without_spread_the_state_stays_bit_for_bit(
  run, train_step, reference, batch
):
  """Neither weight decay nor momentum moves it; only the counters count."""
  state, _ = run(batch)
  before = copy(state)
  momentum = optax.tree.get(before.actor.opt_state, 'trace')
  assert np.abs(np.asarray(momentum['head'][...])).max() > 0
  first_end_BT = batch.turn_end & (np.cumsum(batch.turn_end, axis=1) == 1)
  equal = dataclasses.replace(
    batch, reward=np.where(first_end_BT, -0.1, 0.0).astype(np.float32)
  )
  assert (equal.reward.sum(axis=1) == np.float32(-0.1)).all()
  state, metrics = train_step.fused(state, reference, equal, key_of())
  assert_equal(state.actor, before.actor)
  assert (int(state.step), int(state.skipped), int(state.streak)) == (2, 1, 1)
  assert int(metrics['selection/kept_with_spread']) == 0
  assert int(metrics['selection/skipped_steps']) == 1
  assert all(np.isfinite(np.asarray(value)) for value in metrics.values())
  state, metrics = train_step.fused(state, reference, batch, key_of())
  assert (int(state.streak), int(state.skipped)) == (0, 1)
  assert int(metrics['selection/skipped_in_a_row']) == 0


def test_two_calls_equal_the_fused_one(
  run, train_step, fresh, reference, batch
):
  fused, fused_metrics = run(batch)
  rows, metrics = train_step.prepare(fresh, reference, batch, key_of())
  state, metrics = train_step.finish(fresh, rows, metrics, key_of())
  assert_same_step((state, metrics), (fused, fused_metrics))


def test_eight_devices_make_the_same_step(
  run, model, reference, batch, step_config, spread_out
):
  """And one micro-batch of eight rows instead of two of four."""
  graphdef, params = model
  mesh, place = spread_out
  whole = half_in(step_config, 8)
  train_step = step_lib.TrainStep(step_lib.Learner(graphdef, MOMENTUM), whole)
  placed, rows = place(copy(params), batch)
  frozen, _ = place(reference, batch)
  one = run(batch)
  assert largest_difference(one[0].actor.params, params) > 1e-2
  with jax.set_mesh(mesh):
    state = state_lib.create(state_lib.create_model_state(placed, MOMENTUM))
    before = shardings(state)
    eight = train_step.fused(state, frozen, rows, key_of())
    assert_same_step(eight, one)
    # Each array stays where it was, so the next step compiles nothing.
    assert shardings(eight[0]) == before
    metrics_lib.count_compilations()
    count, key = metrics_lib.count_compilations(), key_of(1)
    train_step.fused(eight[0], frozen, rows, key)
    assert metrics_lib.count_compilations() == count


def test_explain_gives_the_weights_of_training(
  train_step, fresh, reference, batch
):
  """Of the kept rows, scored in one piece, with the key of the signal."""
  kept = jax.tree.map(lambda x: x[[*range(4), *range(12, 16)]], batch)
  signal_key, _ = jax.random.split(key_of())
  rows, metrics = train_step.prepare(fresh, reference, batch, key_of())
  signal_BT, weight_BT = train_step.explain(fresh, reference, kept, signal_key)
  assert np.std(np.asarray(weight_BT)[kept.action]) > 0.01
  np.testing.assert_allclose(weight_BT, rows.weight_BT, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    metrics['signal/mean'], np.asarray(signal_BT)[kept.action].mean(), rtol=1e-4
  )


def test_one_compilation_for_each_length(run, train_step, reference, batch):
  """Not one for each step: a state that was stepped is like a fresh one."""

  def longer(x):
    return x if x.ndim == 1 else np.pad(x, ((0, 0), (0, 8)))

  metrics_lib.count_compilations()
  state, _ = run(batch)
  keys = [key_of(seed) for seed in range(3)]
  before = metrics_lib.count_compilations()
  for key in keys:
    state, _ = train_step.fused(state, reference, batch, key)
  assert int(state.step) == 4 and metrics_lib.count_compilations() == before
  padded = dataclasses.replace(
    jax.tree.map(longer, batch),
    turn=np.pad(batch.turn, ((0, 0), (0, 8)), constant_values=-1),
  )
  state, _ = train_step.fused(state, reference, padded, key_of())
  assert metrics_lib.count_compilations() == before + 1
  train_step.fused(state, reference, padded, key_of())
  assert metrics_lib.count_compilations() == before + 1


# --- Mini-batches ------------------------------------------------------------


@pytest.fixture(scope='module')
def labelled(batch, step_config, prepared):
  """Rows whose number stands in `return_BT`, which a policy does not read."""
  rows, _ = prepared(batch, step_config())
  number_B1 = jnp.arange(16, dtype=jnp.float32)[:, None]
  return rows.replace(return_BT=jnp.tile(number_B1, (1, 24)))


def cut(rows, key, **sizes):
  """Mini-batches, and the numbers of their rows."""
  parts = step_lib.minibatches(rows, key, **sizes)
  return parts, parts.return_BT[:, :, 0].astype(int).tolist()


def test_mini_batches_are_a_partition_of_the_rows(labelled):
  """Each row once an epoch, in an order that the key names."""
  _, seen = cut(labelled, key_of(), size=8, epochs=2)
  assert [len(rows) for rows in seen] == [8] * 4
  first, second = seen[0] + seen[1], seen[2] + seen[3]
  assert sorted(first) == sorted(second) == list(range(16))
  assert first != second and first != list(range(16))
  _, other = cut(labelled, key_of(10), size=8, epochs=1)
  assert sorted(other[0] + other[1]) == list(range(16))
  assert other[0] + other[1] != first
  assert cut(labelled, key_of(), size=8, epochs=2)[1] == seen


def test_one_optimizer_step_per_mini_batch(
  labelled, model, step_config, gradient
):
  """The four steps by hand: each sees what the one before has changed."""
  graphdef, params = model
  chosen = step_config(learner__minibatch=8, learner__epochs=2)
  parts, seen = cut(labelled, key_of(), size=8, epochs=2)

  def of_params(params, minibatch):
    return step_lib.actor_gradient(graphdef, params, minibatch, chosen)

  after, metrics = jax.jit(
    lambda actor, parts: step_lib.optimize(
      actor, parts, of_params, MOMENTUM, name='actor'
    )
  )(state_lib.create_model_state(params, MOMENTUM), parts)
  losses, ratios = [], []
  opt_state = MOMENTUM.init(params)
  for rows in seen:
    part = jax.tree.map(lambda x, rows=rows: x[np.array(rows)], labelled)
    grads, found = gradient(part, chosen, params)
    updates, opt_state = MOMENTUM.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    losses.append(float(found['actor/loss']))
    ratios.append(float(found['actor/ratio_max']))
  assert np.std(losses) > 1e-2 and np.std(ratios) > 1e-2
  np.testing.assert_allclose(metrics['actor/loss'], np.mean(losses), rtol=1e-3)
  np.testing.assert_allclose(metrics['actor/ratio_max'], max(ratios), rtol=1e-3)
  assert largest_difference(params, model[1]) > 1e-2
  assert largest_difference(params, after.params) < 1e-4


def test_a_mini_batch_without_a_token_moves_nothing(labelled, optax_promotes):
  """Not even by momentum and weight decay."""
  tx = optax.adamw(0.1, weight_decay=0.5)
  model = state_lib.create_model_state({'w': jnp.ones(3)}, tx)
  parts = step_lib.minibatches(labelled, key_of(), size=16, epochs=1)

  def gradient(params, minibatch):
    del minibatch
    return {'w': jnp.zeros_like(params['w'])}, {}

  def optimize(sampled_BT):
    rows = parts.replace(sampled_BT=sampled_BT)
    return step_lib.optimize(model, rows, gradient, tx, name='actor')[0]

  assert_equal(optimize(jnp.zeros_like(parts.sampled_BT)), model)
  moved = optimize(parts.sampled_BT)
  assert float(jnp.abs(moved.params['w'] - 1).max()) > 0.01
