"""The guards that conftest.py sets are on: each one raises where it should."""

import jax
import jax.numpy as jnp
import pytest


def test_eight_devices():
  assert jax.device_count() == 8


def test_rank_promotion_raises():
  with pytest.raises(ValueError, match='rank_promotion'):
    jnp.ones((2, 3)) + jnp.ones((3,))


def test_dtype_promotion_raises():
  with pytest.raises(jax.dtypes.TypePromotionError, match='dtype_promotion'):
    jnp.ones((2,), jnp.float32) + jnp.ones((2,), jnp.int32)
