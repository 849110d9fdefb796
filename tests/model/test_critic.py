"""The critic: what it expects before each token, and where it comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from actfocus_jax.model import scoring, transformer
from actfocus_jax.parallel import mesh as mesh_lib

TOKENS = np.random.default_rng(4).integers(0, 96, (4, 10), np.int32)
VALID = np.arange(10)[None, :] < np.array([10, 7, 1, 4])[:, None]
SEEN = VALID & (np.arange(10)[None, :] > 0)

value = jax.jit(scoring.value_tokens)


def _named(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {mesh_lib.path_name(path): leaf for path, leaf in leaves}


def _fresh(config, params):
  graphdef, shapes = transformer.abstract(config, jnp.float32, is_critic=True)
  return graphdef, transformer.critic_from(params, shapes)


def _critic(config, params):
  """A critic that expects something."""
  graphdef, params = _fresh(config, params)
  head = jax.random.normal(jax.random.key(5), params['value_head'].shape)
  params['value_head'][...] = head
  return graphdef, params


@pytest.fixture(scope='module')
def critic(tied):
  config, _, params = tied
  return _critic(config, params)


@pytest.mark.parametrize('kind', ['tied', 'untied', 'qwen3'])
def test_values_equal_a_loop_over_hidden_states(kind, request):
  """The policy's hidden states before each token, times the head."""
  config, policy, params = request.getfixturevalue(kind)
  graphdef, ours = _critic(config, params)
  found = np.asarray(value(graphdef, ours, TOKENS, VALID))
  hidden = np.asarray(nnx.merge(policy, params).hidden(TOKENS), np.float64)
  head = np.asarray(ours['value_head'][...], np.float64)
  expected = np.zeros(TOKENS.shape)
  for b, t in zip(*np.nonzero(SEEN), strict=True):
    expected[b, t] = sum(hidden[b, t - 1] * head)
  assert found.dtype == np.float32 and np.std(expected[SEEN]) > 0.5
  np.testing.assert_allclose(found, expected, atol=2e-5)
  np.testing.assert_array_equal(found[~SEEN], 0.0)


def test_value_depends_only_on_earlier_tokens_by_gradient(critic):
  graphdef, params = critic
  # One embedding row per position, so that gradients do not mix.
  tokens = np.arange(10, dtype=np.int32)[None, :]

  def values(table):
    moved = jax.tree.map(lambda x: x, params)
    moved['embedding'][...] = table
    valid = np.ones_like(tokens, bool)
    return scoring.value_tokens(graphdef, moved, tokens, valid)[0]

  slopes = jax.jit(jax.jacrev(values))(params['embedding'][...])
  size = np.abs(np.asarray(slopes)).max(axis=-1)  # [value at t, vocabulary]
  np.testing.assert_array_equal(size[:, 10:], 0.0)
  before = np.tri(10, k=-1, dtype=bool)
  assert size[:, :10][before].min() > 1e-5
  np.testing.assert_array_equal(size[:, :10][~before], 0.0)


def test_fresh_critic_predicts_zero(tied):
  config, _, policy = tied
  made = transformer.create(
    config,
    mesh_lib.make_mesh(devices=jax.devices()[:1]),
    jax.random.key(0),
    dtype=jnp.float32,
    is_critic=True,
  )
  for graphdef, params in (made, _fresh(config, policy)):
    hidden = nnx.merge(graphdef, params).hidden(TOKENS)
    assert np.abs(hidden).min(axis=(0, 1)).max() > 1e-3
    found = value(graphdef, params, TOKENS, VALID)
    np.testing.assert_array_equal(found, np.zeros(TOKENS.shape))


def _gradient(graphdef, params):
  """Of the squared distance of the values from 1."""

  def loss(params):
    value_BT = scoring.value_tokens(graphdef, params, TOKENS, VALID)
    return jnp.sum(jnp.where(SEEN, jnp.square(value_BT - 1.0), 0.0))

  found = _named(jax.jit(jax.grad(loss))(params))
  return {name: np.abs(np.asarray(x)).max() for name, x in found.items()}


@pytest.mark.parametrize('kind', ['untied', 'qwen3'])
def test_the_gradient_reaches_the_trunk_through_a_head(kind, request):
  config, _, policy = request.getfixturevalue(kind)
  before = _gradient(*_fresh(config, policy))
  assert before.pop('value_head') > 0.1
  assert len(before) > 10 and set(before.values()) == {0.0}
  after = _gradient(*_critic(config, policy))
  assert min(after.values()) > 1e-3, after


@pytest.mark.parametrize('kind', ['tied', 'untied', 'qwen3'])
def test_a_critic_is_the_policy_with_another_head(kind, request):
  config, _, params = request.getfixturevalue(kind)
  policy, (_, ours) = _named(params), _fresh(config, params)
  _, shapes = transformer.abstract(config, jnp.float32, is_critic=True)
  assert jax.tree.structure(ours) == jax.tree.structure(shapes)
  critic = _named(ours)
  assert ('head' in policy) == (kind != 'tied') and 'value_head' not in policy
  assert set(critic) == set(policy) - {'head'} | {'value_head'}
  for name in set(critic) - {'value_head'}:
    np.testing.assert_array_equal(critic[name], policy[name], err_msg=name)
    assert critic[name].sharding == policy[name].sharding


def test_critic_shares_no_buffer_with_the_policy(untied):
  """Both are donated by their updates."""
  config, _, policy = untied
  _, ours = _fresh(config, policy)
  pointers = [
    {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}
    for tree in (policy, ours)
  ]
  assert all(pointers) and not pointers[0] & pointers[1]


@pytest.mark.parametrize('sizes', [{'fsdp': 2, 'tensor': 2}, {'fsdp': 8}])
def test_values_on_eight_devices_equal_one(untied, sizes):
  config, _, params = untied
  mesh, rules = mesh_lib.make_mesh(**sizes), transformer.PARTITION_RULES
  where = mesh_lib.param_shardings(mesh, rules, params)
  _, ours = _critic(config, jax.device_put(params, where))
  graphdef, one = _critic(config, params)
  tokens, valid = np.tile(TOKENS, (2, 1)), np.tile(VALID, (2, 1))
  tokens[4:] = tokens[4:, ::-1]
  with jax.set_mesh(mesh):
    batch = mesh_lib.put_rows(mesh, (tokens, valid))
    eight = value(graphdef, ours, *batch)
  assert len(eight.sharding.device_set) == 8
  expected = value(graphdef, one, tokens, valid)
  assert np.std(expected) > 0.5
  np.testing.assert_allclose(np.asarray(eight), expected, atol=2e-5)
