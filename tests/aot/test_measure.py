"""FLOPs by hand and against the compiler; memory of a run by part."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from actfocus_jax.aot import measure, programs
from actfocus_jax.config import schema
from actfocus_jax.model import architecture, scoring, transformer
from actfocus_jax.parallel import mesh as mesh_lib

# --- FLOPs -------------------------------------------------------------------

PRODUCT = 2 * 8 * 16 * 32


def traced(function, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(function).trace(*args)


def count(function, *shapes, **options):
  return measure.flops(traced(function, *shapes).jaxpr, **options)


def test_flops_of_a_product_and_a_batch_of_them():
  assert count(jnp.matmul, (8, 16), (16, 32)) == PRODUCT
  assert count(jnp.matmul, (5, 8, 16), (5, 16, 32)) == 5 * PRODUCT
  assert count(lambda x: jnp.sin(x) * x, (8, 16)) == 0


def test_flops_of_a_precise_product_count_its_passes():
  def precise(a, b):
    return jnp.matmul(a, b, precision='highest')

  assert count(precise, (8, 16), (16, 32)) == 6 * PRODUCT


def test_flops_of_loops_count_as_often_as_they_run():
  def scanned(x, w):
    return jax.lax.scan(lambda y, _: (y @ w, None), x, length=7)[0]

  assert count(scanned, (8, 16), (16, 16)) == 7 * 2 * 8 * 16 * 16

  def decided_by_data(x, w):
    return jax.lax.while_loop(lambda y: y.sum() > 0, lambda y: y @ w, x)

  found = count(decided_by_data, (8, 16), (16, 16), trips=3.5)
  assert found == 3.5 * 2 * 8 * 16 * 16


def test_flops_of_branches_are_those_of_the_largest():
  def either(x, w):
    return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x)

  assert count(either, (8, 16), (16, 16)) == 2 * 8 * 16 * 16


def test_flops_of_a_gradient_include_recomputation():
  def loss(x, w):
    return jnp.sum(jax.checkpoint(lambda y: jnp.sin(y @ w))(x))

  # Forward, again in the backward pass, and the gradients of both.
  found = count(jax.grad(loss, argnums=(0, 1)), (8, 16), (16, 32))
  assert found == 4 * PRODUCT


def test_flops_in_shard_map_count_for_each_device():
  with jax.set_mesh(mesh_lib.make_mesh(data=2, fsdp=4)):
    apply = jax.shard_map(
      jnp.matmul, in_specs=(P('fsdp'), P()), out_specs=P('fsdp')
    )
    # Eight devices, data twice the same: each of them multiplies 2 rows.
    assert count(apply, (8, 16), (16, 32)) == 2 * PRODUCT


def test_flops_of_a_training_step_are_six_a_parameter_and_token():
  config = architecture.Config(512, 256, 1024, 4, 4, 2, 64)
  graphdef, params = transformer.abstract(config, jnp.float32)
  tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
  valid = jax.ShapeDtypeStruct((2, 32), bool)

  def loss(params, tokens, valid):
    scores = scoring.score_tokens(graphdef, params, tokens, valid)
    return scores.logprob_BT.sum()

  found = measure.flops(
    jax.jit(jax.grad(loss)).trace(params, tokens, valid).jaxpr
  )
  rule = 6 * config.num_parameters * tokens.size
  # Above it: attention, and logits that are computed again.
  assert found == pytest.approx(rule, rel=0.12) and found > rule


def test_flops_of_a_causal_kernel_are_half_of_its_grid():
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


# --- Memory ------------------------------------------------------------------

SMALL = architecture.Config(256, 64, 128, 2, 4, 2, 16)
WORK = programs.Workload(20, 10, 16, 2, context=128, steps=8)


def small_run(algo='ppo', prompts=8, members=16, slots=None):
  """A run on data 2 and fsdp 4; prompts and members of its evaluation."""
  c = schema.defaults('sokoban')
  c.eval.update(prompts=prompts, members=members)
  if slots is not None:
    c.rollout.slots = slots
  c.algo = algo
  c.model.dtype = 'float32'
  c.limits.update(context=128, response_tokens=16, turns=2)
  c.learner.update(minibatch=32, microbatch=8)
  return programs.Run(c, SMALL, dict(data=2, fsdp=4), None, WORK)


def bytes_of(run):
  return {part: programs.per_chip(x) for part, x in run.parts().items()}


def names(run):
  return [x.name for x in run.programs()]


@pytest.fixture(scope='module')
def run():
  return small_run()


def test_parts_are_split_as_the_mesh_says(run):
  parts = bytes_of(run)
  numbers = SMALL.num_parameters
  # Norms and biases are not split: 4 x 64, 64 and 2 x (64 + 32 + 32) numbers.
  whole = 2 * 2 * 64 + 64 + 2 * (64 + 32 + 32)
  assert parts['actor'] == 4 * ((numbers - whole) / 4 + whole)
  assert parts['critic'] == parts['actor'] + 4 * 64
  assert parts['optimizers'] == pytest.approx(
    2 * (parts['actor'] + parts['critic']), abs=100
  )
  assert parts['decoding copy'] == 4 * numbers  # Not split over fsdp.
  cache = 2 * 2 * 128 * 128 * 2 * 16 * 4
  assert parts['cache'] == pytest.approx(cache / 8, rel=0.01)


def test_parts_outside_and_arguments_are_everything(run):
  """No part is counted twice or forgotten while a program runs."""
  always = {'actor', 'critic', 'optimizers', 'reference'}
  arguments = {
    'decoding copy': {'actor'},
    'prefill of prompts': {'decoding copy'},
    'admit': {'cache', 'prompt cache'},
    'prefill, view 128': {'decoding copy', 'cache'},
    'compact': {'cache'},
    'decode, view 128': {'decoding copy', 'cache'},
    'score, length 128': {'actor', 'critic', 'reference', 'batch'},
    'update, length 128': {'actor', 'critic', 'optimizers'},
  }
  assert sorted(names(run)) == sorted(arguments)
  for program in run.programs():
    own = arguments[program.name]
    both = set(program.beside) | own
    assert not set(program.beside) & own
    if program.phase != 'rollout':
      assert both == always | {'batch'}
    else:
      assert (
        always <= both <= always | {'decoding copy', 'cache'} | {'prompt cache'}
      )


def test_evaluation_counts_where_it_is_larger(run):
  def added(**changes):
    larger = small_run(**changes)
    return larger, [x.name for x in larger.programs() if not x.calls]

  assert not any('evaluation' in name for name in names(run))
  larger, extra = added(prompts=32)
  assert extra == [
    'compact',
    'prefill of prompts in evaluation',
    'admit in evaluation',
  ]
  prompts = bytes_of(larger)['prompt cache']
  assert prompts == 4 * programs.per_chip(larger.training.prompts)
  larger, extra = added(prompts=32, slots=0)
  assert 'prefill in evaluation, view 128' in extra
  assert 'decode in evaluation, view 128' in extra
  cache = bytes_of(larger)['cache']
  assert cache == pytest.approx(4 * bytes_of(run)['cache'], rel=0.01)
  # As many prompts as in training, but more slots: 8 x 64 of 8 x 16.
  _, extra = added(prompts=8, members=64, slots=0)
  assert 'admit in evaluation' in extra
  assert 'prefill of prompts in evaluation' not in extra


def test_programs_compile_and_their_memory_adds_up(run):
  """Small, on CPU devices: the measurements that a TPU would get."""
  with jax.numpy_dtype_promotion('standard'):
    costs = measure.costs(run, 1e9)
  by_name = {cost.name: cost for cost in costs}
  assert list(by_name) == names(run)
  assert all(cost.fits(1e9) and cost.arguments > 0 for cost in costs)
  # 8 steps of 16 slots a device: 2 FLOPs for each number of the matrices (576
  # stand in norms and biases), and 4 for each of 64 head channels and 128
  # positions of each of 2 layers.
  one_id = 2 * (SMALL.num_parameters - 576) + 4 * 64 * 128 * 2
  decode = by_name['decode, view 128']
  assert decode.flops == 8 * 16 * one_id
  # In 8 steps all weights and the whole cache are read.
  parts = bytes_of(run)
  assert decode.moved == 8 * (parts['decoding copy'] + parts['cache'])
  update = by_name['update, length 128']
  tokens = 128 * 128 / 8  # All groups are kept: four mini-batches of 32.
  rule = 6 * tokens * 2 * SMALL.num_parameters
  assert rule < update.flops < 2 * rule
  trained = parts['actor'] + parts['critic'] + parts['optimizers']
  assert update.moved == pytest.approx(2 * trained + parts['batch'], rel=0.01)
  # A quarter of the slots beside all of them.
  shrunk = by_name['compact']
  assert shrunk.temporaries == pytest.approx(shrunk.arguments / 4, rel=0.1)
  assert any(c.kind == 'all-gather' for c in update.collectives)


def test_refusal_of_the_compiler_names_bytes():
  used = 'RESOURCE_EXHAUSTED: ... Used 17.92G of 15.75G hbm. Exceeded by 2.2G'
  assert measure.refused(used) == (17.92 * 2**30, 15.75 * 2**30)
  other = (
    'Ran out of memory on HBM, the total memory required for HLO temporaries '
    '(8.00T) exceeds available HBM (15.75G).'
  )
  assert measure.refused(other) == (8 * 2**40, 15.75 * 2**30)
  assert measure.refused('INVALID_ARGUMENT: no') is None


def test_workload_calls_of_an_episode():
  # 10 + 20, observation 5, 20, 5, then 10 of the 20 that the context leaves.
  work = programs.Workload(10, 5, 20, 4, context=70, steps=8)
  assert (work.length, work.sampled) == (70, 20 + 20 + 10)
  # 8, 8 and 4 ids of the first two turns, 8 and 2 of the last one.
  assert work.decoding() == dict.fromkeys((18, 26, 30, 43, 51, 55, 68, 70), 1.0)
  # Each prefill takes a quarter of the slots, so four are the least.
  assert work.turn_ends() == {35: 4.0, 60: 4.0}
