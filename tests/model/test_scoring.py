"""Scores against a NumPy log-softmax, at any chunk, without [B, T, V]."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from actfocus_jax.model import scoring, transformer
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.run import metrics

TOKENS = np.random.default_rng(1).integers(0, 96, (4, 10), np.int32)
VALID = np.arange(10)[None, :] < np.array([10, 7, 1, 4])[:, None]

# 18 tokens have a score: 6 of them at a time are whole pieces, 7 are not.
SCORED = VALID & (np.arange(10)[None, :] > 0)
MARKS = {
  'none': np.zeros_like(VALID),
  'one': np.arange(40).reshape(4, 10) == 13,
  # Padding and first tokens are marked too; they have no score.
  'random': np.random.default_rng(2).random((4, 10)) < 0.5,
  'all': np.ones_like(VALID),
}
# More rows, and a number of marks for each of them.
ROWS = np.random.default_rng(3).integers(0, 96, (8, 10), np.int32)
LONG = np.arange(10)[None, :] < np.array([10, 9, 10, 7, 1, 8, 10, 4])[:, None]
UNEVEN = np.arange(10)[None, :] < np.array([0, 2, 10, 7, 1, 0, 6, 4])[:, None]

score = jax.jit(scoring.score_tokens, static_argnames=('temperature', 'chunk'))
some = jax.jit(scoring.score_some, static_argnames=('temperature', 'chunk'))


def _fields(scores):
  """Name and array of each field, as NumPy."""
  fields = dataclasses.fields(scores)
  return {f.name: np.asarray(getattr(scores, f.name)) for f in fields}


def _assert_scores(found, expected, where=True):
  """Equal where it is True, exactly 0 elsewhere."""
  expected = _fields(expected)
  for name, ours in _fields(found).items():
    theirs = np.where(where, expected[name], 0.0)
    np.testing.assert_allclose(ours, theirs, atol=2e-5, err_msg=name)
    np.testing.assert_array_equal(ours[theirs == 0.0], 0.0, err_msg=name)


def _oracle(graphdef, params, temperature):
  """Scores in float64, a token at a time, zero where nothing is said."""
  model = nnx.merge(graphdef, params)
  logits = np.asarray(model.unembed(model.hidden(TOKENS)), np.float64)
  out = np.zeros((5, *TOKENS.shape))
  for b, t in np.ndindex(*TOKENS.shape):
    if t == 0 or not VALID[b, t]:
      continue
    f = logits[b, t - 1]
    p = np.exp(f) / np.exp(f).sum()
    warm = np.exp(f / temperature)
    out[0, b, t] = np.log(warm[TOKENS[b, t]] / warm.sum())
    out[1, b, t] = np.log(p[TOKENS[b, t]])
    out[2, b, t] = np.log(np.exp(f).sum())
    out[3, b, t] = sum(f) / 96
    out[4, b, t] = -np.sum(p * np.log(p))
  return scoring.Scores(*out)


@pytest.mark.parametrize('temperature', [1.0, 0.5])
@pytest.mark.parametrize('chunk', [1, 7, 12, 512])
def test_scores_equal_a_numpy_log_softmax(tied, chunk, temperature):
  _, graphdef, params = tied
  found = score(
    graphdef, params, TOKENS, VALID, chunk=chunk, temperature=temperature
  )
  expected = _oracle(graphdef, params, temperature)
  for name, theirs in _fields(expected).items():
    assert np.std(theirs[SCORED]) > 0.05, name
    np.testing.assert_array_equal(theirs[~SCORED], 0.0)
  _assert_scores(found, expected)
  same = np.allclose(expected.logprob_BT, expected.raw_logprob_BT)
  assert same == (temperature == 1.0)


def test_reduce_logits_by_hand():
  """Logits log 2 and 0: 2/3 and 1/3; at temperature 1/2, 4/5 and 1/5."""
  logits = jnp.array([[[np.log(2.0), 0.0]]], jnp.float32)
  found = scoring.reduce_logits(logits, jnp.array([[1]]), temperature=0.5)
  expected = scoring.Scores(
    logprob_BT=np.log([[1 / 5]]),
    raw_logprob_BT=np.log([[1 / 3]]),
    logsumexp_BT=np.log([[3.0]]),
    mean_logit_BT=np.log([[2.0]]) / 2,
    entropy_BT=np.log([[3.0]]) - np.log([[2.0]]) * 2 / 3,
  )
  _assert_scores(found, expected)


def test_gradients_do_not_depend_on_the_chunk(untied):
  _, graphdef, params = untied

  whole, pieces = (
    _gradient(graphdef, chunk)(params, TOKENS, VALID) for chunk in (512, 7)
  )
  assert float(jnp.max(jnp.abs(whole['head'][...]))) > 0.1
  _assert_close(whole, pieces)


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


def _logits_in(function, *args):
  """Shape of the largest array of logits in a function."""
  shapes = list(_shapes(jax.make_jaxpr(function)(*args).jaxpr))
  return max((s for s in shapes if len(s) > 2 and s[-1] == 96), key=np.prod)


def _largest(graphdef, params, chunk):
  """The same of a step, forward or backward."""

  def loss(params):
    scores = scoring.score_tokens(graphdef, params, TOKENS, VALID, chunk=chunk)
    return jnp.sum(scores.logprob_BT) + jnp.sum(scores.entropy_BT)

  return _logits_in(jax.grad(loss), params)


def test_logits_of_all_positions_never_exist(tied):
  _, graphdef, params = tied
  # The first line shows that the check can see them.
  assert _largest(graphdef, params, 512) == (4, 9, 96)
  assert _largest(graphdef, params, 8) == (4, 2, 96)
  assert _largest(graphdef, params, 1) == (4, 1, 96)


def test_chunk_counts_tokens_of_one_row_block(tied):
  """Four rows over four row shards: one row each, so eight positions of it."""
  _, graphdef, params = tied
  mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
  spread = _spread(mesh, params)
  with jax.set_mesh(mesh):
    assert _largest(graphdef, spread, 8) == (1, 8, 96)
    tokens, valid = mesh_lib.put_rows(mesh, (TOKENS, VALID))
    eight = score(graphdef, spread, tokens, valid, chunk=8)
  one = score(graphdef, params, TOKENS, VALID, chunk=8)
  _assert_scores(eight, one)


def _spread(mesh, params):
  where = mesh_lib.param_shardings(mesh, transformer.PARTITION_RULES, params)
  return jax.device_put(params, where)


def _assert_close(tree, other):
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, np.asarray(b), rtol=2e-4, atol=2e-4)


def _gradient(graphdef, chunk):
  def total(params, tokens, valid):
    scores = scoring.score_tokens(graphdef, params, tokens, valid, chunk=chunk)
    return jnp.sum(scores.logprob_BT) + 3.0 * jnp.sum(scores.entropy_BT)

  return jax.jit(jax.grad(total))


def test_gradients_of_eight_devices_equal_one(untied):
  _, graphdef, params = untied
  one = _gradient(graphdef, 8)(params, TOKENS, VALID)
  mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    batch = mesh_lib.put_rows(mesh, (TOKENS, VALID))
    eight = _gradient(graphdef, 4)(_spread(mesh, params), *batch)
  assert float(jnp.max(jnp.abs(one['head'][...]))) > 0.1
  _assert_close(one, eight)


def test_the_unembedding_crosses_devices_once_per_call(untied):
  """In no loop over pieces is it gathered, or its gradient summed."""
  _, graphdef, params = untied
  mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    batch = mesh_lib.put_rows(mesh, (TOKENS, VALID))
    step = _gradient(graphdef, 4).lower(_spread(mesh, params), *batch)
  inside = {True: 0, False: 0}
  for part in step.compile().as_text().split('\n\n'):
    # 48 columns of the vocabulary of 96: its half under tensor=2.
    moves = re.findall(r'f32\[32,48\].* all-(?:gather|reduce)\(', part)
    inside['ENTRY' not in part] += len(moves)
  assert inside[False] > 0 and inside[True] == 0


@pytest.mark.parametrize(
  ('kind', 'chunk', 'temperature'),
  [('tied', 1, 1.0), ('tied', 6, 0.5), ('untied', 512, 0.5), ('qwen3', 7, 0.5)],
)
def test_score_some_equals_score_tokens_at_marks(
  request, kind, chunk, temperature
):
  _, graphdef, params = request.getfixturevalue(kind)
  args = (graphdef, params, TOKENS, VALID)
  every = score(*args, temperature=temperature)
  counts = [int((mask_BT & SCORED).sum()) for mask_BT in MARKS.values()]
  assert counts[:2] == [0, 1] and 1 < counts[2] < 18 and counts[3] == 18
  assert (MARKS['random'] & ~VALID).any() and MARKS['random'][:, 0].any()
  for mask_BT in MARKS.values():
    found = some(*args, mask_BT, chunk=chunk, temperature=temperature)
    _assert_scores(found, every, mask_BT)


def test_score_some_computes_as_many_pieces_as_marks_need(tied, monkeypatch):
  """Pieces of 6: none, one, and 3 of the 6 that all positions would need."""
  pieces, reduce = [], scoring.reduce_logits

  def counted(*args, **kwargs):
    jax.debug.callback(lambda: pieces.append(1))
    return reduce(*args, **kwargs)

  monkeypatch.setattr(scoring, 'reduce_logits', counted)
  _, graphdef, params = tied
  step = jax.jit(lambda mask_BT: scoring.score_some(*args, mask_BT, chunk=6))
  args = (graphdef, params, TOKENS, VALID)
  for name, count in (('none', 0), ('one', 1), ('all', 3)):
    pieces.clear()
    jax.block_until_ready(step(MARKS[name]))
    jax.effects_barrier()
    assert len(pieces) == count, name


@pytest.mark.parametrize(
  ('sizes', 'rows'),
  [
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, 8),
    ({'data': 8}, 8),
    # Rows that do not divide are scored as one block.
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, 7),
  ],
)
def test_score_some_on_eight_devices_equals_one(untied, sizes, rows):
  _, graphdef, params = untied
  mesh = mesh_lib.make_mesh(**sizes)
  batch = (ROWS[:rows], LONG[:rows], UNEVEN[:rows])
  with jax.set_mesh(mesh):
    if rows % mesh_lib.row_shards(mesh) == 0:
      batch = mesh_lib.put_rows(mesh, batch)
    found = some(graphdef, _spread(mesh, params), *batch, chunk=2)
  assert len(found.logprob_BT.sharding.device_set) == 8
  every = score(graphdef, params, ROWS, LONG)
  every = jax.tree.map(lambda x_BT: x_BT[:rows], every)
  _assert_scores(found, every, UNEVEN[:rows])


def test_padding_changes_no_score(tied):
  _, graphdef, params = tied
  junk = np.where(VALID, TOKENS, 95 - TOKENS)
  assert (junk != TOKENS).sum() == (~VALID).sum()
  wider = np.pad(junk, ((0, 0), (0, 3)), constant_values=5)
  valid = np.pad(VALID, ((0, 0), (0, 3)))
  plain = score(graphdef, params, TOKENS, VALID)
  for found in (
    score(graphdef, params, wider, valid, chunk=16),
    some(graphdef, params, wider, valid, np.ones_like(valid), chunk=16),
  ):
    padding = jax.tree.map(lambda x_BT: x_BT[:, 10:], found)
    _assert_scores(padding, jax.tree.map(jnp.zeros_like, padding))
    _assert_scores(jax.tree.map(lambda x_BT: x_BT[:, :10], found), plain)


def test_score_some_with_other_marks_compiles_nothing(tied):
  _, graphdef, params = tied
  some(graphdef, params, TOKENS, VALID, MARKS['none'], chunk=6)
  before = metrics.count_compilations()
  jax.jit(lambda x: x * 5)(np.ones(19))
  assert metrics.count_compilations() == before + 1  # It does count.
  for mask_BT in MARKS.values():
    some(graphdef, params, TOKENS, VALID, mask_BT, chunk=6)
  assert metrics.count_compilations() == before + 1


@pytest.mark.parametrize('bad', [{'temperature': 0.0}, {'chunk': 0}])
def test_nonpositive_arguments_are_refused(tied, bad):
  with pytest.raises(ValueError, match='must be positive'):
    score(*tied[1:], TOKENS, VALID, **bad)
