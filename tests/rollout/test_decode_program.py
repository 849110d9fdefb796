"""The compiled programs of a rollout: data moved between devices, and ids."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.model import architecture, transformer
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.rollout import sampling

# No size is the product or the multiple of others, so that a gathered weight
# cannot be taken for something else; 2 key heads.
CONFIG = architecture.Config(
  704, 64, 96, 3, 8, 2, 8, rope_theta=100.0, tie_word_embeddings=False
)
SLOTS, LENGTH, STEPS = 16, 40, 5
COLLECTIVE = re.compile(
  r'(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)'
  r'(?:-start)?\('
)
GATHER = re.compile(r'= \(?(.*?)\)? all-gather(?:-start)?\(')


def gathered(text):
  """Shapes that the all-gathers of a compiled program give."""
  for result in GATHER.findall(text):
    for dims in re.findall(r'\w+\[([\d,]*)\]', result):
      yield tuple(int(n) for n in dims.split(',') if n)


def gathered_parameters(text, layout):
  """The gathers that give a parameter, or one layer of it.

  Anywhere: what stands before the loop is moved once per call of a few steps.

  Args:
    text: of the program.
    layout: the parameters; a gather gives all of one, or what a device holds.
  """
  shapes = set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(layout):
    is_stacked = mesh_lib.path_name(path).startswith('layers/')
    for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape)):
      layer = shape[is_stacked:]
      if len(layer) == 2:
        shapes |= {shape, layer, layer[::-1], (1, *layer)}
  return sorted(set(gathered(text)) & shapes)


def model(mesh):
  return transformer.create(CONFIG, mesh, jax.random.key(0), dtype=jnp.float32)


def slots(mesh):
  """Half of the slots have something to say."""
  empty = sampling.empty_on(mesh, CONFIG, SLOTS, LENGTH, jnp.float32)
  row_B = jnp.arange(SLOTS, dtype=jnp.int32)
  row = mesh_lib.rows(mesh)
  return empty.replace(
    last_B=jax.device_put(3 + row_B, row),
    row_B=jax.device_put(row_B, row),
    budget_B=jax.device_put(STEPS * (row_B % 2), row),
  )


def decode_arguments(mesh, graphdef, params):
  key, temperature = jax.random.key(1), jnp.ones(())
  static = dict(steps=STEPS, view=LENGTH, stop_ids=(1,), ends_early=True)
  return (graphdef, params, slots(mesh), key, temperature), static


def program(mesh, graphdef, params):
  with jax.set_mesh(mesh):
    given, static = decode_arguments(mesh, graphdef, params)
    return sampling.decode.lower(*given, **static).compile().as_text()


@pytest.mark.parametrize(
  'sizes', [dict(data=2, fsdp=2, tensor=2), dict(fsdp=8, data=1)]
)
def test_decoding_gathers_no_parameter(sizes):
  """In the decode layout; as the learner holds them, every kernel is."""
  mesh = mesh_lib.make_mesh(**sizes)
  graphdef, params = model(mesh)
  layout = mesh_lib.decode_layout(params, mesh, jnp.float32)
  assert gathered_parameters(program(mesh, graphdef, layout), layout) == []
  split = gathered_parameters(program(mesh, graphdef, params), layout)
  assert len(split) >= 3, 'kernels are gathered, and this test must see it'


@pytest.mark.parametrize('tensor', [2, 4, 8])
def test_repeated_key_heads_decode_the_same(tensor):
  """2 key heads over 4 and 8 devices: each is there twice, and four times."""
  answers = []
  for mesh in (
    mesh_lib.make_mesh(devices=jax.devices()[:1]),
    mesh_lib.make_mesh(tensor=tensor),
  ):
    graphdef, params = model(mesh)
    params = mesh_lib.decode_layout(params, mesh, jnp.float32)
    with jax.set_mesh(mesh):
      given, static = decode_arguments(mesh, graphdef, params)
      answers.append(jax.device_get(sampling.decode(*given, **static)))
  (one, said), (several, found) = answers
  assert said.live_NB.any() and not said.live_NB.all()
  np.testing.assert_array_equal(found.token_NB, said.token_NB)
  np.testing.assert_allclose(found.logprob_NB, said.logprob_NB, atol=1e-5)
  k_BLSJC = one.cache.k_BLSN.reshape(SLOTS, 3, LENGTH, 2, 8)
  k_BLSJC = np.repeat(k_BLSJC, max(tensor // 2, 1), axis=3)
  expected = k_BLSJC.reshape(several.cache.k_BLSN.shape)
  np.testing.assert_allclose(several.cache.k_BLSN, expected, atol=1e-5)


def test_ends_early_changes_no_emitted_id():
  """Of 5 steps nobody needs more than 3; the others change nothing."""
  mesh = mesh_lib.make_mesh()
  graphdef, params = model(mesh)
  texts, answers = [], []
  with jax.set_mesh(mesh):
    for ends_early in (True, False):
      given, static = decode_arguments(mesh, graphdef, params)
      static['ends_early'] = ends_early
      short = jnp.minimum(given[2].budget_B, 3)
      given = (*given[:2], given[2].replace(budget_B=short), *given[3:])
      lowered = sampling.decode.lower(*given, **static)
      texts.append(lowered.compile().as_text())
      answers.append(jax.device_get(sampling.decode(*given, **static)))
  assert [' all-reduce(' in text for text in texts] == [True, False]
  (one, said), (other, found) = answers
  assert said.live_NB.any(axis=1).tolist() == [True] * 3 + [False] * 2
  np.testing.assert_array_equal(found.live_NB, said.live_NB)
  for ours, theirs in (
    (found.token_NB, said.token_NB),
    (found.logprob_NB, said.logprob_NB),
  ):
    np.testing.assert_array_equal(ours[said.live_NB], theirs[said.live_NB])
  for name in ('last_B', 'length_B', 'budget_B'):
    np.testing.assert_array_equal(getattr(other, name), getattr(one, name))
  # Of the pending id, which what idles feeds again and again, nobody reads.
  fed_BS = np.arange(LENGTH) < one.length_B[:, None] - 1
  k_BSLN, expected_BSLN = (
    np.moveaxis(slots.cache.k_BLSN, 2, 1) for slots in (other, one)
  )
  np.testing.assert_allclose(k_BSLN[fed_BS], expected_BSLN[fed_BS], atol=1e-6)


@pytest.mark.parametrize('tensor', [2, 4])
def test_no_part_of_the_cache_is_gathered(tensor):
  """At 4 devices for 2 key heads: only the new keys and values are, whole."""
  mesh = mesh_lib.make_mesh(tensor=tensor)
  graphdef, params = model(mesh)
  layout = mesh_lib.decode_layout(params, mesh, jnp.float32)
  text = program(mesh, graphdef, layout)
  assert 'all-to-all' not in text and 'collective-permute' not in text
  assert not [shape for shape in gathered(text) if LENGTH in shape]


def test_no_cache_moves_when_episodes_start_grow_or_end():
  mesh = mesh_lib.make_mesh(data=4, fsdp=2)
  with jax.set_mesh(mesh):
    graphdef, params = model(mesh)
    params = mesh_lib.decode_layout(params, mesh, jnp.float32)
    prompts = sampling.empty_on(mesh, CONFIG, 8, 8, jnp.float32)
    shapes = ((SLOTS,), (8,), (8, 4))
    row, eight, tokens = (
      mesh_lib.put_rows(mesh, np.ones(shape, np.int32)) for shape in shapes
    )
    program_of = {
      'admit': sampling.admit.lower(slots(mesh), prompts, row, row, row),
      'compact': sampling.compact.lower(slots(mesh), eight),
      'prefill': sampling.prefill.lower(
        *(graphdef, params, slots(mesh), tokens, eight, eight, eight),
        view=LENGTH,
      ),
      'prefill_prompts': sampling.prefill_prompts.lower(
        graphdef, params, tokens, eight, config=CONFIG, dtype=jnp.float32
      ),
    }
    for name, lowered in program_of.items():
      assert COLLECTIVE.findall(lowered.compile().as_text()) == [], name
