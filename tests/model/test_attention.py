"""Attention: worked by hand, by loops, and its two forms against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.model import attention


def _inputs(B=2, T=3, S=5, H=4, J=2, C=6):
  key = iter(jax.random.split(jax.random.key(0), 3))
  q = jax.random.normal(next(key), (B, T, H, C))
  k = jax.random.normal(next(key), (B, S, J, C))
  v = jax.random.normal(next(key), (B, S, J, C))
  position = jnp.array([[0, 3, 1], [4, 2, 9]])
  return q, k, v, position


def test_golden():
  """Scores 0 and ln 3 weigh 1/4 and 3/4; position 0 sees the first key only."""
  k = jnp.array([0.0, np.log(3.0)]).reshape(1, 2, 1, 1)
  v = jnp.array([4.0, 8.0]).reshape(1, 2, 1, 1)
  q = jnp.array([[1.0, 0.0], [1.0, 0.0]]).reshape(1, 2, 2, 1)
  out = attention.attend(q, k, v, jnp.array([[1, 0]]))
  np.testing.assert_allclose(
    out[0, :, :, 0], [[7.0, 6.0], [4.0, 4.0]], rtol=1e-6
  )


def test_equals_loops():
  q, k, v, position = _inputs()
  out = np.asarray(attention.attend(q, k, v, position))
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  for b, t, h in np.ndindex(2, 3, 4):
    last = min(int(position[b, t]), 4)
    score = [q[b, t, h] @ k[b, s, h // 2] / 6**0.5 for s in range(last + 1)]
    weight = np.exp(score) / np.sum(np.exp(score))
    expected = sum(w * v[b, s, h // 2] for s, w in enumerate(weight))
    np.testing.assert_allclose(out[b, t, h], expected, atol=2e-6)


def test_one_query_equals_many():
  """T = 1 takes another form; each query alone must give the same."""
  q, k, v, position = _inputs()
  together = attention.attend(q, k, v, position)
  for t in range(3):
    one = slice(t, t + 1)
    alone = attention.attend(q[:, one], k, v, position[:, one])
    np.testing.assert_allclose(alone, together[:, one], atol=2e-6)


@pytest.mark.parametrize('block', [1, 4, 64])
def test_whole_rows_in_blocks_equal_one_product(block):
  """Blocks that divide the row, that do not, and one that holds it whole."""
  q, k, v, _ = _inputs(T=11, S=11)
  position = jnp.broadcast_to(jnp.arange(11)[None, :], (2, 11))

  def total(f):
    return lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v)))

  plain = jax.jit(lambda q, k, v: attention.attend(q, k, v, position))
  blocks = functools.partial(attention.attend_in_blocks, block=block)
  np.testing.assert_allclose(blocks(q, k, v), plain(q, k, v), atol=2e-6)
  for a, b in zip(
    jax.grad(total(blocks), argnums=(0, 1, 2))(q, k, v),
    jax.grad(total(plain), argnums=(0, 1, 2))(q, k, v),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, atol=5e-6)


def test_rotation_depends_on_distance_only():
  q, k, _, _ = _inputs(T=1, S=1, H=1, J=1)

  def score(at_q, at_k):
    turned_q, turned_k = (
      attention.rotate(x, attention.rotary(jnp.full((2, 1), at), 6, 100.0))
      for x, at in ((q, at_q), (k, at_k))
    )
    return jnp.sum(turned_q * turned_k)

  np.testing.assert_allclose(score(7, 4), score(3, 0), rtol=1e-4)
  assert abs(score(7, 4) - score(7, 5)) > 1e-2


def test_uneven_heads_are_refused():
  q, k, v, position = _inputs(H=3)
  with pytest.raises(ValueError, match='3 query heads'):
    attention.attend(q, k, v, position)
