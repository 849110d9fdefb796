"""FLOPs before compilation: by hand, against the compiler, against 6 N."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from actfocus_jax.aot import flops
from actfocus_jax.model import architecture, scoring, transformer
from actfocus_jax.parallel import mesh

PRODUCT = 2 * 8 * 16 * 32


def traced(function, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(function).trace(*args)


def count(function, *shapes, **options):
  return flops.count(traced(function, *shapes).jaxpr, **options)


def test_a_product_and_a_batch_of_them():
  assert count(jnp.matmul, (8, 16), (16, 32)) == PRODUCT
  assert count(jnp.matmul, (5, 8, 16), (5, 16, 32)) == 5 * PRODUCT
  assert count(lambda x: jnp.sin(x) * x, (8, 16)) == 0


def test_the_passes_of_a_precise_product():
  def precise(a, b):
    return jnp.matmul(a, b, precision='highest')

  assert count(precise, (8, 16), (16, 32)) == 6 * PRODUCT


def test_loops_count_as_often_as_they_run():
  def scanned(x, w):
    return jax.lax.scan(lambda y, _: (y @ w, None), x, length=7)[0]

  assert count(scanned, (8, 16), (16, 16)) == 7 * 2 * 8 * 16 * 16

  def decided_by_data(x, w):
    return jax.lax.while_loop(lambda y: y.sum() > 0, lambda y: y @ w, x)

  found = count(decided_by_data, (8, 16), (16, 16), trips=3.5)
  assert found == 3.5 * 2 * 8 * 16 * 16


def test_branches_count_as_the_dearest():
  def either(x, w):
    return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x)

  assert count(either, (8, 16), (16, 16)) == 2 * 8 * 16 * 16


def test_a_gradient_recomputes_what_is_not_kept():
  def loss(x, w):
    return jnp.sum(jax.checkpoint(lambda y: jnp.sin(y @ w))(x))

  # Forward, again in the backward pass, and the gradients of both.
  found = count(jax.grad(loss, argnums=(0, 1)), (8, 16), (16, 32))
  assert found == 4 * PRODUCT


def test_what_devices_do_for_themselves_counts_for_each():
  made = mesh.make_mesh(data=2, fsdp=4)
  with jax.set_mesh(made):
    apply = jax.shard_map(
      jnp.matmul, in_specs=(P('fsdp'), P()), out_specs=P('fsdp')
    )
    # Eight devices, data twice the same: each of them multiplies 2 rows.
    assert count(apply, (8, 16), (16, 32)) == 2 * PRODUCT


def test_the_compiler_agrees_where_there_is_no_loop():
  def two_layers(x, w, v):
    return jnp.maximum(x @ w, 0.0) @ v

  program = traced(two_layers, (64, 128), (128, 256), (256, 32))
  ours = flops.count(program.jaxpr)
  theirs = program.lower().compile().cost_analysis()['flops']
  assert ours == 2 * 64 * (128 * 256 + 256 * 32)
  assert ours <= theirs < 1.02 * ours  # It counts the maximum, too.


def test_a_training_step_is_six_flops_a_parameter_and_token():
  config = architecture.Config(512, 256, 1024, 4, 4, 2, 64)
  graphdef, params = transformer.abstract(config, jnp.float32)
  tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
  valid = jax.ShapeDtypeStruct((2, 32), bool)

  def loss(params, tokens, valid):
    scores = scoring.score_tokens(graphdef, params, tokens, valid)
    return scores.logprob_BT.sum()

  found = flops.count(
    jax.jit(jax.grad(loss)).trace(params, tokens, valid).jaxpr
  )
  rule = 6 * config.num_parameters * tokens.size
  # Above it: attention, and logits that are computed again.
  assert found == pytest.approx(rule, rel=0.12) and found > rule


def test_a_causal_kernel_counts_half_of_its_grid():
  from jax.experimental import pallas as pl

  def square(x_ref, o_ref):
    o_ref[...] = x_ref[...] @ x_ref[...]

  def called(name):
    return pl.pallas_call(
      square,
      out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32),
      grid=(3, 2),
      name=name,
    )

  whole = 6 * 2 * 8**3
  assert count(called('square'), (8, 8)) == whole
  assert count(called('splash_mha'), (8, 8)) == whole / 2

  def beside(x):
    return jax.lax.scan(lambda y, _: (called('a')(y @ y), None), x, length=3)[0]

  assert count(beside, (8, 8), only_kernels=True) == 3 * whole
