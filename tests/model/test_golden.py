"""Our models say what transformers and torch say of the same files.

`golden/` holds small random models as transformers wrote them and what torch
made of them; `golden/make.py` made both. Where torch is installed, fresh models
of random shapes go through the same tests.
"""

import functools
import importlib.util
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from actfocus_jax.model import architecture, hf, scoring, transformer
from actfocus_jax.parallel import mesh as meshes

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
FRESH = [f'fresh_{family}_{i}' for family in ('qwen2', 'qwen3') for i in '012']


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


def _make():
  """Returns make.py as a module; skips where torch is not installed."""
  pytest.importorskip('torch')
  spec = importlib.util.spec_from_file_location('make', GOLDEN / 'make.py')
  make = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(make)
  return make


def _fresh(name, mesh, directory):
  """A model of a random shape, drawn and described now."""
  make = _make()
  _, family, i = name.split('_')
  variant = make.random_variant(family, seed=int(i))
  model = make.write(variant, directory)
  expected = make.expect(model, lengths=(19, 33), seed=variant.seed)
  make.check(expected)
  return Case(*hf.load(directory, mesh, dtype=jnp.float32), expected)


@pytest.fixture(scope='module', params=NAMES + FRESH)
def case(request, tmp_path_factory):
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  if request.param in NAMES:
    return _golden(request.param, mesh)
  return _fresh(request.param, mesh, tmp_path_factory.mktemp('fresh'))


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


def _greedy_in_full(case):
  """A whole forward pass per token, without a cache. Returns the same."""
  tokens, length = _roomy(case), case.expected['length_B']
  B, N = case.expected['greedy_BN'].shape
  row, seen = np.arange(B), []
  for n in range(N):
    logits = _forward(case.graphdef, case.params, tokens)
    seen.append(np.asarray(logits)[row, length + n - 1])
    tokens[row, length + n] = np.argmax(seen[-1], axis=-1)
  at = length[:, None] + np.arange(N)[None, :]
  return np.take_along_axis(tokens, at, axis=1), np.stack(seen, axis=1)


def _check_greedy(case):
  cached, cached_logits = _greedy_with_cache(case)
  full, full_logits = _greedy_in_full(case)
  assert case.expected['greedy_BN'].shape == (len(cached), 64)
  np.testing.assert_array_equal(cached, case.expected['greedy_BN'])
  np.testing.assert_array_equal(full, case.expected['greedy_BN'])
  _assert_logits(cached_logits, full_logits)


def test_logits_equal_torch(case):
  _check_logits(case)


def test_scores_equal_torch(case):
  _check_scores(case)


def test_greedy_continuations_equal_torch(case):
  _check_greedy(case)


@pytest.mark.parametrize('name', EVEN)
def test_eight_devices_equal_torch(name):
  mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
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


def test_torch_reads_what_we_write(case, tmp_path):
  """Back through our files: the logits are those of the first model."""
  make = _make()
  hf.save(tmp_path / 'model', case.config, case.params)
  peer = make.transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'model', dtype=make.torch.float32
  )
  tokens, length = case.expected['tokens_BT'][0], case.expected['length_B'][0]
  found = make.forward(peer, tokens[:length].astype(np.int64))
  _assert_logits(found, case.expected['logits_BTV'][0, :length])
