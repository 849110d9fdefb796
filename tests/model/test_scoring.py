"""Scores against a NumPy log-softmax, at any chunk, without [B, T, V]."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from actfocus_jax.model import mesh as meshes
from actfocus_jax.model import scoring, transformer

TOKENS = np.random.default_rng(1).integers(0, 96, (4, 10), np.int32)
VALID = np.arange(10)[None, :] < np.array([10, 7, 1, 4])[:, None]

score = jax.jit(scoring.score_tokens, static_argnames=('temperature', 'chunk'))


def _oracle(graphdef, params, temperature):
  """Three float64 arrays, a token at a time, zero where nothing is said."""
  model = nnx.merge(graphdef, params)
  logits = np.asarray(model.unembed(model.hidden(TOKENS)), np.float64)
  out = np.zeros((3, *TOKENS.shape))
  for b, t in np.ndindex(*TOKENS.shape):
    if t == 0 or not VALID[b, t]:
      continue
    f = logits[b, t - 1]
    p = np.exp(f) / np.exp(f).sum()
    warm = np.exp(f / temperature)
    out[0, b, t] = np.log(warm[TOKENS[b, t]] / warm.sum())
    out[1, b, t] = np.log(np.exp(f).sum())
    out[2, b, t] = -np.sum(p * np.log(p))
  return out


@pytest.mark.parametrize('temperature', [1.0, 0.5])
@pytest.mark.parametrize('chunk', [1, 7, 12, 512])
def test_scores_equal_the_oracle(tied, chunk, temperature):
  _, graphdef, params = tied
  found = score(
    graphdef, params, TOKENS, VALID, chunk=chunk, temperature=temperature
  )
  expected = _oracle(graphdef, params, temperature)
  fields = (found.logprob_BT, found.logsumexp_BT, found.entropy_BT)
  for ours, theirs in zip(fields, expected, strict=True):
    assert np.std(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    np.testing.assert_array_equal(np.asarray(ours)[~VALID], 0.0)
    np.testing.assert_array_equal(np.asarray(ours)[:, 0], 0.0)


def test_golden_uniform_and_shifted_logits():
  """Equal logits of 2 over four ids: log 1/4, 2 + log 4, log 4."""
  logits = jnp.full((1, 1, 4), 2.0)
  scores = scoring.reduce_logits(logits, jnp.array([[3]]), temperature=0.5)
  np.testing.assert_allclose(scores.logprob_BT, -np.log(4), rtol=1e-6)
  np.testing.assert_allclose(scores.logsumexp_BT, 2 + np.log(4), rtol=1e-6)
  np.testing.assert_allclose(scores.entropy_BT, np.log(4), rtol=1e-6)


def test_gradients_do_not_depend_on_the_chunk(untied):
  _, graphdef, params = untied

  whole, pieces = (
    _gradient(graphdef, chunk)(params, TOKENS, VALID) for chunk in (512, 7)
  )
  assert float(jnp.max(jnp.abs(whole['head'][...]))) > 0.1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
    whole,
    pieces,
  )


def test_gradient_of_one_embedding_entry_by_differences(tied):
  _, graphdef, params = tied

  def total(params):
    scores = score(graphdef, params, TOKENS, VALID, chunk=8)
    return jnp.sum(scores.logprob_BT + scores.entropy_BT)

  def moved(step):
    table = params['embedding'][...]
    shifted = jax.tree.map(lambda x: x, params)
    shifted['embedding'][...] = table.at[TOKENS[0, 1], 3].add(step)
    return float(total(shifted))

  slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
  exact = jax.jit(jax.grad(total))(params)['embedding'][TOKENS[0, 1], 3]
  assert abs(slope) > 0.1
  np.testing.assert_allclose(exact, slope, rtol=2e-2)


def _shapes(jaxpr):
  """All shapes in a jaxpr and in those inside it."""
  for equation in jaxpr.eqns:
    yield from (v.aval.shape for v in equation.outvars)
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'jaxpr')
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from _shapes(inner)


def _largest(graphdef, params, chunk):
  """Shape of the largest array of logits in a step, forward or backward."""

  def loss(params):
    scores = scoring.score_tokens(graphdef, params, TOKENS, VALID, chunk=chunk)
    return jnp.sum(scores.logprob_BT) + jnp.sum(scores.entropy_BT)

  shapes = list(_shapes(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
  logits = [s for s in shapes if len(s) > 2 and s[-1] == 96]
  return max(logits, key=np.prod)


def test_logits_of_all_positions_never_exist(tied):
  _, graphdef, params = tied
  # The first line shows that the check can see them.
  assert _largest(graphdef, params, 512) == (4, 9, 96)
  assert _largest(graphdef, params, 8) == (4, 2, 96)
  assert _largest(graphdef, params, 1) == (4, 1, 96)


def test_chunk_counts_tokens_of_one_row_block(tied):
  """Four rows over four row shards: one row each, so eight positions of it."""
  _, graphdef, params = tied
  mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
  where = meshes.param_shardings(mesh, transformer.PARTITION_RULES, params)
  spread = jax.device_put(params, where)
  with jax.set_mesh(mesh):
    assert _largest(graphdef, spread, 8) == (1, 8, 96)
    tokens, valid = meshes.put_rows(mesh, (TOKENS, VALID))
    eight = score(graphdef, spread, tokens, valid, chunk=8)
  one = score(graphdef, params, TOKENS, VALID, chunk=8)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, np.asarray(b), atol=2e-5),
    one,
    eight,
  )


def _gradient(graphdef, chunk):
  def total(params, tokens, valid):
    scores = scoring.score_tokens(graphdef, params, tokens, valid, chunk=chunk)
    return jnp.sum(scores.logprob_BT) + 3.0 * jnp.sum(scores.entropy_BT)

  return jax.jit(jax.grad(total))


def test_gradients_of_eight_devices_equal_one(untied):
  _, graphdef, params = untied
  one = _gradient(graphdef, 8)(params, TOKENS, VALID)
  mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
  where = meshes.param_shardings(mesh, transformer.PARTITION_RULES, params)
  with jax.set_mesh(mesh):
    batch = meshes.put_rows(mesh, (TOKENS, VALID))
    eight = _gradient(graphdef, 4)(jax.device_put(params, where), *batch)
  assert float(jnp.max(jnp.abs(one['head'][...]))) > 0.1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, np.asarray(b), rtol=2e-4, atol=2e-4
    ),
    one,
    eight,
  )


def test_the_unembedding_crosses_devices_once_per_call(untied):
  """In no loop over pieces is it gathered, or its gradient summed."""
  _, graphdef, params = untied
  mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
  where = meshes.param_shardings(mesh, transformer.PARTITION_RULES, params)
  with jax.set_mesh(mesh):
    batch = meshes.put_rows(mesh, (TOKENS, VALID))
    step = _gradient(graphdef, 4).lower(jax.device_put(params, where), *batch)
  inside = {True: 0, False: 0}
  for part in step.compile().as_text().split('\n\n'):
    # 48 columns of the vocabulary of 96: its half under tensor=2.
    moves = re.findall(r'f32\[32,48\].* all-(?:gather|reduce)\(', part)
    inside['ENTRY' not in part] += len(moves)
  assert inside[False] > 0 and inside[True] == 0


def test_a_single_token_has_no_score(tied):
  _, graphdef, params = tied
  scores = score(graphdef, params, TOKENS[:, :1], VALID[:, :1])
  jax.tree.map(
    lambda x: np.testing.assert_array_equal(x, np.zeros((4, 1))), scores
  )


@pytest.mark.parametrize('bad', [{'temperature': 0.0}, {'chunk': 0}])
def test_bad_arguments_are_refused(tied, bad):
  _, graphdef, params = tied
  with pytest.raises(ValueError, match='must be positive'):
    score(graphdef, params, TOKENS, VALID, **bad)
