"""Our models say what transformers and torch say of the same files.

`golden/` holds small random models as transformers wrote them and what torch
made of them; `golden/make.py` made both.
"""

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from actfocus_jax.model import architecture, hf, scoring, transformer
from actfocus_jax.parallel import mesh as mesh_lib

GOLDEN = pathlib.Path(__file__).parent / 'golden'
NAMES = [
  'qwen2_tied',
  'qwen2_tied_bfloat16',
  'qwen2_untied_sharded',
  'qwen3_tied',
  'qwen3_untied_float16',
  'qwen3_untied_sharded',
]
# Their sizes divide over data=2, fsdp=2, tensor=2.
EVEN = ['qwen2_tied_bfloat16', 'qwen3_untied_sharded']


class Case(NamedTuple):
  """A model as we loaded it, and what torch says of it (see make.py)."""

  config: architecture.Config
  graphdef: nnx.GraphDef
  params: nnx.State
  expected: dict[str, np.ndarray]


def _golden(name, mesh):
  loaded = hf.load(GOLDEN / name, mesh, dtype=jnp.float32)
  with np.load(GOLDEN / name / 'expected.npz') as expected:
    return Case(*loaded, dict(expected))


@pytest.fixture(scope='module', params=NAMES)
def case(request):
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  return _golden(request.param, mesh)


def _assert_logits(found, expected):
  """Within 2e-5 of the largest logit."""
  assert found.dtype == np.float32 and found.shape == expected.shape
  np.testing.assert_allclose(
    found, expected, rtol=0, atol=2e-5 * np.abs(expected).max()
  )


@jax.jit
def _forward(graphdef, params, tokens):
  model = nnx.merge(graphdef, params)
  return model.unembed(model.hidden(tokens))


@functools.partial(jax.jit, static_argnames='view')
def _extend(graphdef, params, tokens, start, cache, *, view):
  model = nnx.merge(graphdef, params)
  hidden, cache = model.extend(tokens, start, cache, view=view)
  return model.unembed(hidden), cache


_score = jax.jit(scoring.score_tokens, static_argnames='temperature')


def _valid(expected):
  T = expected['tokens_BT'].shape[1]
  return np.arange(T)[None, :] < expected['length_B'][:, None]


def _roomy(case):
  """The tokens in rows with room for the continuation."""
  extra = case.expected['greedy_BN'].shape[1]
  return np.pad(case.expected['tokens_BT'], [(0, 0), (0, extra)])


def _check_logits(case):
  found = np.asarray(_forward(case.graphdef, case.params, _roomy(case)))
  expected, valid = case.expected['logits_BTV'], _valid(case.expected)
  _assert_logits(found[:, : valid.shape[1]][valid], expected[valid])


def _check_scores(case):
  e = case.expected
  found = _score(
    case.graphdef, case.params, e['tokens_BT'], _valid(e), temperature=0.7
  )
  for ours, theirs, tolerance in (
    # The temperature divides the errors of the logits too.
    (found.logprob_BT, 'cool_logprob_BT', 1e-5 / 0.7),
    (found.raw_logprob_BT, 'logprob_BT', 1e-5),
    (found.logsumexp_BT, 'logsumexp_BT', 1e-5),
    (found.entropy_BT, 'entropy_BT', 1e-5),
  ):
    assert np.std(e[theirs][_valid(e)]) > 0.1
    # Padding and first tokens are 0 in both.
    np.testing.assert_allclose(
      ours, e[theirs], rtol=0, atol=tolerance, err_msg=theirs
    )


def _greedy_with_cache(case):
  """Prefill, then a token a step. Returns (ids_BN, logits_BNV)."""
  tokens, length = case.expected['tokens_BT'], case.expected['length_B']
  B, N = case.expected['greedy_BN'].shape
  S = tokens.shape[1] + N
  cache = transformer.init_cache(case.config, B, S, jnp.float32)
  run = functools.partial(_extend, case.graphdef, case.params)
  first, cache = run(tokens, np.zeros(B, np.int32), cache, view=S)

  traces = []

  @jax.jit
  def step(logits, start, cache):
    traces.append(1)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    after, cache = run(token[:, None], start, cache, view=S)
    return token, after[:, 0], cache

  logits, ids, seen = first[np.arange(B), length - 1], [], []
  for n in range(N):
    seen.append(logits)
    token, logits, cache = step(logits, length + n, cache)
    ids.append(np.asarray(token))
  assert len(traces) == 1
  return np.stack(ids, axis=1), np.stack(seen, axis=1)


def _check_greedy(case):
  ids_BN, logits_BNV = _greedy_with_cache(case)
  assert case.expected['greedy_BN'].shape == (len(ids_BN), 64)
  np.testing.assert_array_equal(ids_BN, case.expected['greedy_BN'])
  # A whole forward pass over the same ids, without a cache.
  tokens, length = _roomy(case), case.expected['length_B']
  at = length[:, None] + np.arange(64)[None, :]
  np.put_along_axis(tokens, at, ids_BN, axis=1)
  full = np.asarray(_forward(case.graphdef, case.params, tokens))
  full = np.take_along_axis(full, at[:, :, None] - 1, axis=1)
  _assert_logits(logits_BNV, full)


def test_logits_equal_torch(case):
  _check_logits(case)


def test_scores_equal_torch(case):
  _check_scores(case)


def test_greedy_continuations_equal_torch(case):
  _check_greedy(case)


@pytest.mark.parametrize('name', EVEN)
def test_eight_devices_equal_torch(name):
  mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
  one = _golden(name, mesh)
  kernel = one.params['layers']['q']['kernel'][...]
  shard = kernel.addressable_shards[0].data.shape
  assert shard == (2, kernel.shape[1] // 2, kernel.shape[2] // 2)
  # Four rows, one for every row shard.
  rows = {k: np.repeat(v, 2, axis=0) for k, v in one.expected.items() if v.ndim}
  case = one._replace(expected=rows)
  with jax.set_mesh(mesh):
    _check_logits(case)
    _check_scores(case)
    _check_greedy(case)
