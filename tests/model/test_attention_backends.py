"""The kernels of accelerators against plain products, without either device.

On CPU the TPU kernel runs interpreted; what a program for another platform
calls is read from its lowering, which needs no such device. The arithmetic of
cuDNN cannot be tested here, only that it is called.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.model import attention, kernels, scoring, transformer
from actfocus_jax.parallel import mesh as mesh_lib

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
  return mesh_lib.make_mesh(data=1, fsdp=fsdp, tensor=tensor, devices=devices)


@pytest.mark.parametrize(
  ('T', 'H', 'J', 'C'),
  [
    (40, 4, 2, 64),  # less than a block
    (128, 2, 2, 128),  # no groups, nothing filled up
    (1030, 2, 1, 128),  # three blocks of 512
    (700, 3, 1, 64),  # one block, half of its keys at a time
  ],
)
def test_splash_equals_products(T, H, J, C):
  _assert_same(interpreted, _inputs(B=1, T=T, H=H, J=J, C=C))


@pytest.mark.parametrize(
  ('fsdp', 'tensor', 'H', 'J', 'B'),
  [
    (4, 2, 4, 2, 8),  # a key head for each
    (1, 6, 12, 4, 8),  # each key head three times, two for each
    (2, 4, 6, 2, 8),  # neither heads divide: all for each
    (2, 2, 4, 2, 3),  # rows that do not divide
  ],
)
def test_splash_on_a_mesh_equals_products(fsdp, tensor, H, J, B):
  inputs = _inputs(B=B, T=20, H=H, J=J, C=8)
  _assert_same(interpreted, inputs, _mesh(fsdp, tensor))


def test_splash_is_causal_by_gradient():
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


def test_model_with_splash_scores_and_learns_the_same(tied, monkeypatch):
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


# --- What a program calls ----------------------------------------------------


def _lowered(f, inputs, platform, mesh=None):
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    traced = jax.jit(f).trace(*inputs)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('shape', [None, (4, 2)])
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
    ('cpu', jnp.bfloat16, 64, 'xla'),
    ('tpu', jnp.float32, 32, 'splash'),
    ('gpu', jnp.bfloat16, 128, 'cudnn'),
    ('cuda', jnp.bfloat16, 64, 'cudnn'),
    ('gpu', jnp.float32, 64, 'xla'),
    ('gpu', jnp.bfloat16, 36, 'xla'),
  ],
)
def test_choose_auto_gives_the_platforms_kernel(platform, dtype, size, name):
  assert attention.choose('auto', platform, dtype, size) == name
  assert attention.choose(name, platform, dtype, size) == name
  assert attention.choose('xla', platform, dtype, size) == 'xla'
  if name == 'cudnn':  # From compute capability 8 on.
    for capability, found in (('7.5', 'xla'), ('10.0', name), ('gfx9', 'xla')):
      args = ('auto', platform, dtype, size, capability)
      assert attention.choose(*args) == found


@pytest.mark.parametrize(
  ('wanted', 'platform', 'dtype', 'size', 'told'),
  [
    ('splash', 'cpu', 'bfloat16', 64, 'devices are cpu.*allowed: auto, xla.$'),
    ('cudnn', 'tpu', 'bfloat16', 64, 'are tpu.*allowed: auto, xla, splash.$'),
    ('cudnn', 'gpu', 'float32', 64, 'computes in float32.*auto, xla.$'),
    ('cudnn', 'gpu', 'bfloat16', 36, 'size 36.*allowed: auto, xla.$'),
  ],
)
def test_choose_refuses_an_unfit_backend(wanted, platform, dtype, size, told):
  with pytest.raises(
    ValueError, match=f"model.attention is '{wanted}'.*{told}"
  ):
    attention.choose(wanted, platform, dtype, size)
