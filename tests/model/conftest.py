"""One tiny random model for the whole room: grouped keys, nothing at its init.

Biases and norms are random too: at zero and one an error in them shows nowhere.
"""

import jax
import jax.numpy as jnp
import pytest

from actfocus_jax.model import architecture, transformer
from actfocus_jax.parallel import mesh as mesh_lib

CONFIG = dict(
  vocab_size=96,
  hidden_size=32,
  intermediate_size=48,
  num_layers=2,
  num_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  rope_theta=100.0,
)


def _random(path, leaf):
  key = jax.random.fold_in(jax.random.key(7), hash_of(path))
  noise = jax.random.normal(key, leaf.shape, leaf.dtype)
  return leaf + 0.2 * noise


def hash_of(path):
  return sum((i + 1) * ord(c) for i, c in enumerate(mesh_lib.path_name(path)))


def _model(tied, kind='qwen2'):
  config = architecture.Config(
    **CONFIG, tie_word_embeddings=tied, model_type=kind
  )
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  graphdef, params = transformer.create(
    config, mesh, jax.random.key(0), dtype=jnp.float32
  )
  return config, graphdef, jax.tree_util.tree_map_with_path(_random, params)


@pytest.fixture(scope='session')
def tied():
  return _model(True)


@pytest.fixture(scope='session')
def untied():
  return _model(False)


@pytest.fixture(scope='session')
def qwen3():
  return _model(False, 'qwen3')
