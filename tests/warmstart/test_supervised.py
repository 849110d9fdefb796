"""The supervised step: a mean over the response tokens, made smaller."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from actfocus_jax.learner import state as state_lib
from actfocus_jax.model import architecture, scoring, transformer
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.warmstart import supervised

ADAM = optax.adam(3e-3)
ROWS, LENGTH, VOCAB = 6, 16, 48


@pytest.fixture(autouse=True)
def optax_promotes():
  """Optax's Adam raises a float to an int32, which the suite forbids."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture(scope='module')
def model():
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
  return transformer.create(config, mesh, jax.random.key(0), dtype=jnp.float32)


@pytest.fixture(scope='module')
def batch():
  """Rows of unequal length, each with a prompt and two responses."""
  rng = np.random.default_rng(0)
  column, end_B1 = np.arange(LENGTH), LENGTH - np.arange(ROWS)[:, None]
  valid = column < end_B1
  sampled = valid & ((column >= end_B1 - 3) | ((column > 2) & (column < 6)))
  tokens = rng.integers(2, VOCAB, valid.shape).astype(np.int32)
  return types.SimpleNamespace(
    tokens=np.where(valid, tokens, 0), valid=valid, sampled=sampled
  )


@pytest.fixture
def run(model, batch):
  """One step from the initial state; keywords replace an array."""
  graphdef, params = model

  def one(
    tokens=batch.tokens, sampled=batch.sampled, state=None, tx=ADAM, **kwargs
  ):
    if state is None:
      copy = jax.tree.map(lambda x: x + 0, params)
      state = state_lib.create_model_state(copy, tx)
    return supervised.step(
      graphdef, tx, state, tokens, batch.valid, sampled, **kwargs
    )

  return one


def assert_equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def test_loss_is_the_mean_over_response_tokens(run, model, batch):
  _, metrics = run()
  scores = scoring.score_tokens(*model, batch.tokens, batch.valid)
  logprob_BT = np.asarray(scores.logprob_BT)
  np.testing.assert_allclose(
    metrics['loss'], -logprob_BT[batch.sampled].mean(), rtol=1e-5
  )
  everything = -logprob_BT[batch.valid].mean()
  assert abs(float(metrics['loss']) - everything) > 1e-3


def test_loss_falls(run):
  state, first = run()
  for _ in range(15):
    state, last = run(state=state)
  assert int(optax.tree.get(state.opt_state, 'count')) == 16
  assert float(last['loss']) < 0.7 * float(first['loss'])


def test_only_response_tokens_are_learned(run, batch):
  """The last token of a row matters only if it is a response."""
  state, _ = run()
  last = batch.valid.sum(axis=1) - 1
  rows = np.arange(len(last))
  without_last = batch.sampled.copy()
  without_last[rows, last] = False
  other = batch.tokens.copy()
  other[rows, last] = 40
  assert (other != batch.tokens).any()

  unlearned, _ = run(sampled=without_last)
  again, _ = run(tokens=other, sampled=without_last)
  assert_equal(again.params, unlearned.params)
  learned, _ = run(tokens=other)
  head, wanted = (s.params['head'][...] for s in (learned, state))
  assert np.abs(np.asarray(head - wanted)).max() > 1e-4


def test_padding_is_never_learned(run, batch):
  state, _ = run()
  other = np.where(batch.valid, batch.tokens, 17).astype(np.int32)
  assert (other != batch.tokens).any()
  assert_equal(run(tokens=other)[0].params, state.params)


def test_observations_add_the_mean_of_all_other_tokens(run, model, batch):
  """With plain gradients the two parts of the loss add up."""
  before = model[1]
  descent = optax.sgd(0.1)

  def moved(**kwargs):
    state, metrics = run(tx=descent, **kwargs)
    step = jax.tree.map(lambda new, old: new - old, state.params, before)
    return step, float(metrics['loss'])

  observed = batch.valid & ~batch.sampled
  observed[:, 0] = False
  both, both_loss = moved(observation_weight=0.5)
  responses, loss = moved()
  observations, _ = moved(sampled=observed)
  assert both_loss == loss
  parts = jax.tree.map(lambda a, b: a + 0.5 * b, responses, observations)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), both, parts
  )
  largest = max(np.abs(x).max() for x in jax.tree.leaves(observations))
  assert largest > 1e-4
