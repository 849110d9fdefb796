"""A tiny random model and a batch whose rows differ in every way they can."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import (
  estimators,
  losses,
  signals,
  trajectory,
  weights,
)
from actfocus_jax.learner import prepare
from actfocus_jax.learner import update as update_lib
from actfocus_jax.model import architecture, scoring, transformer
from actfocus_jax.parallel import mesh as mesh_lib

VOCAB = 64
GROUPS, MEMBERS, LENGTH = 4, 4, 24
STOP = 1


def _noisy(seed):
  def noisy(path, leaf):
    name = mesh_lib.path_name(path)
    key = jax.random.fold_in(jax.random.key(seed), sum(map(ord, name)))
    return leaf + 0.2 * jax.random.normal(key, leaf.shape, leaf.dtype)

  return functools.partial(jax.tree_util.tree_map_with_path, noisy)


@pytest.fixture(scope='package')
def model():
  """(graphdef, params); biases and norms are not at their init either."""
  config = architecture.Config(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rope_theta=100.0,
    tie_word_embeddings=False,
  )
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  graphdef, params = transformer.create(
    config, mesh, jax.random.key(0), dtype=jnp.float32
  )
  return graphdef, _noisy(1)(params)


@pytest.fixture(scope='package')
def reference(model):
  """Parameters of another model of the same shape."""
  return _noisy(2)(model[1])


@pytest.fixture
def optax_promotes():
  """Optax's Adam raises a float to an int32, which the suite forbids."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture(scope='package')
def score():
  return jax.jit(
    functools.partial(scoring.score_tokens, chunk=4096),
    static_argnames=('graphdef', 'temperature'),
  )


def _row(rng):
  """Kinds of tokens: p prompt, o observation, S thought, A action, s stop."""
  kinds = 'pp' + 'o' * rng.integers(1, 3)
  for turn in range(rng.integers(1, 3)):
    kinds += 'o' * (turn * rng.integers(1, 4))
    kinds += 'S' * rng.integers(1, 4) + 'A' * rng.integers(0, 3) + 'Ss'
  return np.array(list(kinds.ljust(LENGTH, '.')))


def _turns(kind_BT):
  ends = kind_BT == 's'
  turn_BT = np.cumsum(ends, axis=1) - ends
  return np.where(np.isin(kind_BT, ['p', '.']), -1, turn_BT).astype(np.int32)


def _rewards(rng, kind_BT):
  """On turn ends; group 2 gets what has no spread."""
  ends = kind_BT == 's'
  reward_BT = np.where(ends, rng.normal(size=kind_BT.shape), 0.0)
  group_B = np.repeat(np.arange(GROUPS), MEMBERS)
  reward_BT[group_B == 2] = 0.0
  # So that groups 0 and 3 have the largest spreads, and group 1 a small one.
  reward_BT[group_B == 1] *= 0.01
  return reward_BT.astype(np.float32), group_B.astype(np.int32)


@pytest.fixture(scope='package')
def batch(model, score):
  """Sampled by a policy that has since moved, so ratios are not 1."""
  rng = np.random.default_rng(5)
  kind_BT = np.stack([_row(rng) for _ in range(GROUPS * MEMBERS)])
  sampled_BT = np.isin(kind_BT, ['S', 'A', 's'])
  tokens_BT = rng.integers(2, VOCAB, kind_BT.shape).astype(np.int32)
  tokens_BT[kind_BT == 's'] = STOP
  tokens_BT[kind_BT == '.'] = 0
  reward_BT, group_B = _rewards(rng, kind_BT)
  logprob_BT = score(*model, tokens_BT, kind_BT != '.').logprob_BT
  drift_BT = rng.normal(scale=0.3, size=kind_BT.shape)
  made = trajectory.Trajectory(
    tokens=tokens_BT,
    valid=kind_BT != '.',
    sampled=sampled_BT,
    action=kind_BT == 'A',
    turn=_turns(kind_BT),
    turn_end=kind_BT == 's',
    anchor=np.where(_turns(kind_BT) < 0, 0, 7).astype(np.int32),
    logprob=np.where(sampled_BT, logprob_BT + drift_BT, 0).astype(np.float32),
    reward=reward_BT,
    group=group_B,
    success=group_B == 0,
  )
  trajectory.check(made)
  return made


@pytest.fixture(scope='package')
def recipe():
  """ActFocus with all rows in one mini-batch; keywords change a field.

  Equal arguments give the same recipe, so that nothing is compiled twice.
  """

  @functools.cache
  def weigh_tokens(alpha, beta):
    def by_action(signal_BT, entropy_BT, sampled_BT, action_BT, *, step):
      del entropy_BT, step
      return weights.token_weights(
        signal_BT, sampled_BT, action_BT, alpha=alpha, beta=beta
      )

    return by_action

  policy_loss = functools.partial(
    losses.policy_loss, clip_low=0.2, clip_high=0.28
  )

  @functools.cache
  def make(*, alpha=0.1, beta=0.5, **changes):
    fields = dict(
      members=MEMBERS,
      ratio=1.0,
      signal=signals.SIGNALS['energy'],
      token_weights=weigh_tokens(alpha, beta),
      advantage=estimators.group_relative,
      policy_loss=policy_loss,
      entropy_coefficient=0.1,
      minibatch=GROUPS * MEMBERS,
      microbatch=GROUPS * MEMBERS,
      rescore=False,
      score_chunk=4096,
    )
    return prepare.Recipe(**fields | changes)

  return make


@pytest.fixture(scope='package')
def weigh(model, reference, score):
  """Stages 2 and 3, on a batch as it is."""

  def run(batch, recipe, value_BT=None):
    graphdef, params = model
    old, ref = (
      score(graphdef, p, batch.tokens, batch.valid) for p in (params, reference)
    )
    return_PG = jnp.asarray(batch.reward).sum(axis=1).reshape(-1, MEMBERS)
    batch = jax.tree.map(jnp.asarray, batch)
    said = prepare.ModelScores(old, ref, value_BT)
    step = jnp.zeros((), jnp.int32)
    return prepare.weigh(
      batch, return_PG, said, jax.random.key(0), step, recipe
    )

  return run


@pytest.fixture(scope='package')
def gradient(model):
  """(grads, metrics) of one mini-batch; compiled once for each recipe."""
  compiled = jax.jit(
    update_lib.actor_gradient, static_argnames=('graphdef', 'recipe')
  )

  def run(ready, recipe, params=None):
    graphdef, default = model
    return compiled(
      graphdef, default if params is None else params, ready, recipe=recipe
    )

  return run


@pytest.fixture(scope='package')
def spread_out():
  """Eight devices: a mesh, and params and rows placed on it."""
  mesh = mesh_lib.make_mesh(data=4, fsdp=2)

  def place(params, rows):
    where = mesh_lib.param_shardings(mesh, transformer.PARTITION_RULES, params)
    rows = mesh_lib.put_rows(mesh, jax.tree.map(np.asarray, rows))
    return jax.device_put(params, where), rows

  return mesh, place
