import jax


def test_a():
  assert not jax.config.jax_disable_most_optimizations
