"""The kernels of accelerators against plain products, without either device.

On CPU the TPU kernel runs interpreted; what a program for another platform
calls is read from its lowering, which needs no such device. The arithmetic of
cuDNN cannot be tested here, only that it is called.
"""

import contextlib
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from actfocus_jax import build, errors, recipe
from actfocus_jax.cli import paths
from actfocus_jax.config import resume, schema
from actfocus_jax.model import (
  architecture,
  attention,
  kernels,
  scoring,
  transformer,
)
from actfocus_jax.parallel import mesh as meshes

interpreted = functools.partial(kernels.splash, interpret=True)
SPLASH = 'stablehlo.custom_call @tpu_custom_call'
CUDNN = 'stablehlo.custom_call @__cudnn$fmhaSoftmax'


def _inputs(B=2, T=40, H=4, J=2, C=64, dtype=jnp.float32):
  key = iter(jax.random.split(jax.random.key(0), 3))
  return tuple(
    jax.random.normal(next(key), (B, T, heads, C), dtype) for heads in (H, J, J)
  )


def _with_gradient(f):
  """Output and gradients of every input, each output weighed differently."""

  def total(q, k, v):
    out = f(q, k, v)
    return jnp.sum(jnp.sin(3.0 * out)), out

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))


def _assert_same(f, inputs, mesh=None):
  """`f` on the mesh equals plain products without one."""
  (_, expected), wanted = _with_gradient(attention.attend_in_blocks)(*inputs)
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    (_, out), found = _with_gradient(f)(*inputs)
  np.testing.assert_allclose(out, expected, atol=1e-5)
  for name, a, b in zip('qkv', found, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=5e-5, err_msg=name)


def _mesh(fsdp, tensor):
  devices = jax.devices()[: fsdp * tensor]
  return meshes.make_mesh(data=1, fsdp=fsdp, tensor=tensor, devices=devices)


@pytest.mark.parametrize(
  ('T', 'H', 'J', 'C'),
  [
    (40, 4, 2, 64),  # less than a block
    (128, 2, 2, 128),  # no groups, nothing filled up
    (300, 6, 1, 64),  # one key head
    (1030, 2, 1, 128),  # three blocks of 512
    (700, 3, 1, 64),  # one block, half of its keys at a time
  ],
)
def test_splash_equals_products(T, H, J, C):
  _assert_same(interpreted, _inputs(B=1, T=T, H=H, J=J, C=C))


@pytest.mark.parametrize('T', [1, 128, 129, 512, 513, 1024, 3072, 3600, 3840])
def test_blocks_fit_lanes_and_fill_up_little(T):
  size, keys = kernels._block(T)
  assert size % 128 == 0 and size % keys == 0 and keys % 128 == 0
  filled = -(-T // size) * size
  assert filled - T < 128 or filled <= 1.25 * T
  assert size <= 768


@pytest.mark.parametrize(
  ('fsdp', 'tensor', 'H', 'J'),
  [
    (8, 1, 4, 2),
    (4, 2, 4, 2),  # a key head for each
    (2, 4, 8, 2),  # each key head for two
    (1, 6, 12, 4),  # each key head three times, two for each
    (2, 4, 6, 2),  # neither heads divide: all for each
  ],
)
def test_a_mesh_changes_nothing(fsdp, tensor, H, J):
  inputs = _inputs(B=8, T=20, H=H, J=J, C=8)
  _assert_same(interpreted, inputs, _mesh(fsdp, tensor))


def test_rows_that_do_not_divide():
  _assert_same(interpreted, _inputs(B=3, T=20, C=8), _mesh(2, 2))


@pytest.mark.parametrize(
  ('H', 'J', 'devices', 'repeat', 'is_split'),
  [
    (14, 2, 1, 1, True),
    (14, 2, 2, 1, True),
    (16, 2, 4, 2, True),
    (16, 2, 8, 4, True),
    (12, 4, 6, 3, True),
    (14, 2, 4, 1, False),
    (14, 2, 7, 7, True),
  ],
)
def test_keys_are_repeated_as_often_as_needed(H, J, devices, repeat, is_split):
  assert kernels._heads(H, J, devices) == (repeat, is_split)
  assert not is_split or J * repeat % devices == H % (J * repeat) == 0


def test_each_device_takes_its_own_rows_and_heads():
  seen = []

  def kernel(q, k, v):
    seen.append((q.shape, k.shape, v.shape))
    return q

  with jax.set_mesh(_mesh(2, 4)):
    jax.jit(functools.partial(kernels.per_device, kernel))(
      *_inputs(B=3, T=5, H=8, J=2, C=8)
    )
  assert seen == [((2, 5, 2, 8), (2, 5, 1, 8), (2, 5, 1, 8))]


def test_no_query_sees_what_comes_later():
  """By gradient, across a border of blocks, and not even what fills up."""
  q, k, v = _inputs(B=1, T=1030, H=2, J=1, C=8)
  at = 700

  def one(k, v):
    return jnp.sum(jnp.sin(interpreted(q, k, v)[:, at]))

  for gradient in jax.jit(jax.grad(one, argnums=(0, 1)))(k, v):
    size_T = np.abs(gradient).max(axis=(0, 2, 3))
    assert (size_T[at + 1 :] == 0).all() and (size_T[: at + 1] > 0).all()


# --- In the model ------------------------------------------------------------


def _score(graphdef):
  def loss(params, tokens_BT, valid_BT):
    return jnp.sum(
      scoring.score_tokens(graphdef, params, tokens_BT, valid_BT).logprob_BT
    )

  return loss


def _batch(B=8, T=24):
  tokens_BT = jax.random.randint(jax.random.key(1), (B, T), 0, 96)
  length_B1 = jnp.arange(T - B, T)[:, None]
  return tokens_BT, jnp.arange(T)[None, :] < length_B1


def _graphdefs(config, **kwargs):
  return [
    transformer.abstract(config, attention=name, remat=True, **kwargs)[0]
    for name in ('xla', 'splash')
  ]


def test_the_model_scores_and_learns_the_same(tied, monkeypatch):
  """Scanned, recomputed, sharded, on rows with padding: all finite, equal."""
  monkeypatch.setitem(attention.BACKENDS, 'splash', interpreted)
  config, _, params = tied
  params = jax.tree.map(np.asarray, params)
  plain, kernel = (
    jax.jit(jax.value_and_grad(_score(graphdef)))
    for graphdef in _graphdefs(config, dtype=jnp.float32)
  )
  expected, wanted = plain(params, *_batch())
  with jax.set_mesh(_mesh(4, 2)):
    assert 'splash' not in str(plain.trace(params, *_batch()).jaxpr)
    assert 'splash' in str(kernel.trace(params, *_batch()).jaxpr)
    found, gradient = kernel(params, *_batch())
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-3)


def test_padding_stays_finite(tied, monkeypatch):
  monkeypatch.setitem(attention.BACKENDS, 'splash', interpreted)
  config, _, params = tied
  _, graphdef = _graphdefs(config, dtype=jnp.float32)
  tokens_BT, valid_BT = _batch(B=2)
  model = nnx.merge(graphdef, params)
  hidden_BTD = model.hidden(jnp.where(valid_BT, tokens_BT, 0))
  other_BTD = model.hidden(jnp.where(valid_BT, tokens_BT, 1))
  assert np.isfinite(hidden_BTD).all()
  assert (hidden_BTD != other_BTD)[~valid_BT].any()
  np.testing.assert_array_equal(hidden_BTD[valid_BT], other_BTD[valid_BT])


# --- What a program calls ----------------------------------------------------


def _lowered(f, inputs, platform, mesh=None):
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    traced = jax.jit(f).trace(*inputs)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('shape', [None, (8, 1), (4, 2)])
def test_a_program_for_tpu_calls_splash(tied, shape):
  """Lowered from a process whose devices are CPUs."""
  config, _, params = tied
  params = jax.tree.map(np.asarray, params)
  mesh = _mesh(*shape) if shape else None
  xla, splash = (
    _lowered(jax.grad(_score(graphdef)), (params, *_batch()), 'tpu', mesh)
    for graphdef in _graphdefs(config, dtype=jnp.bfloat16)
  )
  # Forward, again in the backward pass, and the backward pass itself.
  assert SPLASH not in xla and splash.count(SPLASH) == 3


def test_an_exported_program_for_tpu_calls_splash():
  f = jax.jit(kernels.splash)
  exported = jax.export.export(f, platforms=['tpu'])(*_inputs())
  assert SPLASH in exported.mlir_module()


def test_a_program_for_cpu_cannot_call_splash():
  with pytest.raises(ValueError, match='interpret mode'):
    _lowered(kernels.splash, _inputs(), 'cpu')


@pytest.mark.parametrize('shape', [None, (4, 2)])
def test_a_program_for_nvidia_calls_cudnn(monkeypatch, shape):
  """Forward and backward, grouped and causal, as jax itself asks for it."""
  module = 'jax._src.cudnn.fused_attention_stablehlo'
  pytest.importorskip(module)
  try:  # It asks for the library while it traces.
    monkeypatch.setattr(f'{module}.check_cudnn_version', lambda: 91000)
  except AttributeError:
    pytest.skip('This jax asks for the cuDNN library in another place.')
  inputs = _inputs(B=8, dtype=jnp.bfloat16)
  mesh = _mesh(*shape) if shape else None

  def total(q, k, v):
    return jnp.sum(kernels.cudnn(q, k, v), dtype=jnp.float32)

  text = _lowered(jax.grad(total, argnums=(0, 1, 2)), inputs, 'cuda', mesh)
  calls = [line for line in text.splitlines() if CUDNN in line]
  assert len(calls) == 2 and 'fmhaSoftmaxBackward' in calls[1]
  shapes = ('8x40x4x64', '8x40x2x64') if mesh is None else ('2x40x2x64',)
  for call in calls:
    assert all(f'tensor<{s}xbf16>' in call for s in shapes)
    assert r'\22mask_type\22: \22CAUSAL\22' in call
    assert r'\22fmha_scale\22: 0.125' in call


# --- The choice --------------------------------------------------------------


@pytest.mark.parametrize(
  ('platform', 'dtype', 'size', 'name'),
  [
    ('cpu', jnp.float32, 64, 'xla'),
    ('cpu', jnp.bfloat16, 64, 'xla'),
    ('tpu', jnp.bfloat16, 128, 'splash'),
    ('tpu', jnp.float32, 32, 'splash'),
    ('gpu', jnp.bfloat16, 128, 'cudnn'),
    ('cuda', jnp.bfloat16, 64, 'cudnn'),
    ('gpu', jnp.float32, 64, 'xla'),
    ('gpu', jnp.bfloat16, 256, 'xla'),
    ('gpu', jnp.bfloat16, 36, 'xla'),
  ],
)
def test_auto_is_the_kernel_of_the_platform(platform, dtype, size, name):
  assert attention.choose('auto', platform, dtype, size) == name
  assert attention.choose(name, platform, dtype, size) == name
  assert attention.choose('xla', platform, dtype, size) == 'xla'


@pytest.mark.parametrize(
  ('wanted', 'platform', 'dtype', 'size', 'told'),
  [
    ('splash', 'cpu', 'bfloat16', 64, 'devices are cpu.*allowed: auto, xla.$'),
    ('splash', 'gpu', 'bfloat16', 64, 'are gpu.*allowed: auto, xla, cudnn.$'),
    ('cudnn', 'tpu', 'bfloat16', 64, 'are tpu.*allowed: auto, xla, splash.$'),
    ('cudnn', 'gpu', 'float32', 64, 'computes in float32.*auto, xla.$'),
    ('cudnn', 'gpu', 'bfloat16', 36, 'size 36.*allowed: auto, xla.$'),
  ],
)
def test_a_misfit_is_refused(wanted, platform, dtype, size, told):
  with pytest.raises(
    ValueError, match=f"model.attention is '{wanted}'.*{told}"
  ):
    attention.choose(wanted, platform, dtype, size)


class _Elsewhere:
  """The mesh of a slice that is not there, or of a GPU."""

  def __init__(self, platform='tpu', **attributes):
    device = types.SimpleNamespace(platform=platform, **attributes)
    self.devices = np.array([device])


SMALL = architecture.Config(
  vocab_size=96,
  hidden_size=32,
  intermediate_size=48,
  num_layers=1,
  num_heads=2,
  num_key_value_heads=1,
  head_dim=16,
)


@pytest.mark.parametrize(
  ('capability', 'name'),
  [
    ('7.0', 'xla'),
    ('7.5', 'xla'),
    ('8.0', 'cudnn'),
    ('9.0', 'cudnn'),
    ('10.0', 'cudnn'),
    ('gfx942', 'xla'),
    (None, 'cudnn'),
  ],
)
def test_cudnn_is_for_gpus_that_can(monkeypatch, capability, name):
  monkeypatch.setattr(build.files, 'config', lambda path: SMALL)
  known = {} if capability is None else {'compute_capability': capability}
  gpu = _Elsewhere('gpu', **known)
  c = schema.defaults()
  assert build.model(c, 'model', gpu).attention == name
  c.model.attention = 'cudnn'
  if name == 'cudnn':
    assert build.model(c, 'model', gpu).attention == name
    return
  told = f"'cudnn', but .* capability {capability}, .*allowed: auto, xla.$"
  refused = pytest.raises(errors.UsageError, match=told)
  with refused, build.refusing_misfits():
    build.model(c, 'model', gpu)


def test_the_mesh_decides_and_not_this_process(monkeypatch):
  monkeypatch.setattr(build.files, 'config', lambda path: SMALL)
  c = schema.defaults()
  made = build.model(c, 'model', _Elsewhere())
  c.algo = 'ppo'
  who = recipe.learners(c, made)
  assert _attention(made, who.actor.graphdef) == 'splash'
  assert _attention(made, who.critic.graphdef, is_critic=True) == 'splash'
  assert build.model(c, 'model', _mesh(1, 1)).attention == 'xla'
  c.model.attention = 'splash'
  refused = pytest.raises(errors.UsageError, match='the devices are cpu')
  with refused, build.refusing_misfits():
    build.model(c, 'model', _mesh(1, 1))


def _attention(made, graphdef, **kwargs):
  _, params = transformer.abstract(made.config, made.dtype, **kwargs)
  return nnx.merge(graphdef, params).attention


def test_a_run_may_go_on_with_another():
  c = schema.defaults()
  before = schema.to_json(c)
  c.model.attention = 'xla'
  assert resume.difference(before, c) is None
  del before['model.attention']  # A run of before there was a choice.
  assert resume.difference(before, c) is None


def test_a_run_can_be_looked_at_elsewhere(tmp_path):
  c = schema.defaults()
  c.model.attention = 'splash'
  (tmp_path / 'config.json').write_text(json.dumps(schema.to_json(c)))
  assert paths.run_config(tmp_path, None).model.attention == 'auto'
