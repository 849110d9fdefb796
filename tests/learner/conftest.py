"""A tiny random model and a batch whose rows differ in every way they can."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_run import config
from trajectory_check import check_trajectory

from actfocus_jax import build
from actfocus_jax.algorithm import trajectory
from actfocus_jax.learner import state as state_lib
from actfocus_jax.learner import train_step as train_step_lib
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
  check_trajectory(made)
  return made


@pytest.fixture(scope='package')
def step_config():
  """TrainStepConfig of ActFocus with all rows in one mini-batch.

  Keywords are fields of the config, with `__` for a dot. Equal arguments give
  the same object, so that nothing is compiled twice.
  """
  base = dict(
    rollout__prompts=GROUPS,
    rollout__members=MEMBERS,
    entropy_coefficient=0.1,
    loss__dual_clip=0.0,
    learner__minibatch=GROUPS * MEMBERS,
    learner__microbatch=0,
    learner__old_logprob='sampler',
    learner__score_chunk=4096,
  )

  @functools.cache
  def make(**fields):
    return build.train_step_config(config('unused', **base | fields))

  return make


@pytest.fixture(scope='package')
def prepared(model, reference):
  """(UpdateBatch, metrics) of a batch: all stages before the update."""
  descent = optax.sgd(0.1)

  @functools.cache
  def compiled(step_config, critic):
    return train_step_lib.TrainStep(
      train_step_lib.Learner(model[0], descent),
      step_config,
      critic=critic and train_step_lib.Learner(critic, descent),
    ).prepare

  def run(batch, step_config, critic=(None, None)):
    actor = state_lib.create_model_state(model[1], descent)
    judge = critic[1] and state_lib.create_model_state(critic[1], descent)
    state = state_lib.create(actor, judge)
    prepare = compiled(step_config, critic[0])
    return prepare(state, reference, batch, jax.random.key(0))

  return run


@pytest.fixture(scope='package')
def gradient(model):
  """(grads, metrics) of one mini-batch; compiled once for each config."""
  compiled = jax.jit(
    train_step_lib.actor_gradient, static_argnames=('graphdef', 'config')
  )

  def run(update_batch, step_config, params=None):
    graphdef, default = model
    return compiled(
      graphdef,
      default if params is None else params,
      update_batch,
      config=step_config,
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
