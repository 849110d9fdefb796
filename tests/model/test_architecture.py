"""The config.json of each family: read, written, and refused."""

import pytest

from actfocus_jax.model import architecture

SIZES = (96, 32, 48, 2, 4, 2, 8)


def _hf(kind='qwen2', **changes):
  config = architecture.Config(*SIZES, rope_theta=500.0, model_type=kind)
  return config.to_hf() | changes


@pytest.mark.parametrize('kind', architecture.FAMILIES)
def test_config_round_trip(kind):
  config = architecture.Config(
    96, 40, 48, 2, 4, 2, 8, rope_theta=500.0, model_type=kind
  )
  assert config.head_dim != config.hidden_size // config.num_heads
  assert architecture.Config.from_hf(config.to_hf()) == config


@pytest.mark.parametrize('kind', architecture.FAMILIES)
def test_transformers_means_the_same_by_a_config(kind):
  """Also by one that leaves out what has a default."""
  transformers = pytest.importorskip('transformers')
  raw = _hf(kind)
  found = transformers.AutoConfig.for_model(**raw)
  assert found.architectures == [architecture.FAMILIES[kind].class_name]
  assert architecture.Config.from_hf(found.to_dict()) == (
    architecture.Config.from_hf(raw)
  )
  for name in (
    *('rms_norm_eps', 'tie_word_embeddings', 'initializer_range'),
    *('max_position_embeddings', 'rope_theta', 'rope_parameters'),
  ):
    del raw[name]
  assert architecture.Config.from_hf(raw) == architecture.Config.from_hf(
    transformers.AutoConfig.for_model(**raw).to_dict()
  )


def test_key_heads_left_out():
  """null means as many as query heads; absent means 32 in transformers."""
  raw = _hf(num_key_value_heads=None)
  assert architecture.Config.from_hf(raw).num_key_value_heads == 4
  del raw['num_key_value_heads']
  with pytest.raises(ValueError, match='lacks num_key_value_heads; allowed'):
    architecture.Config.from_hf(raw)


def test_head_size_left_out():
  """Qwen2 divides the width among the heads; Qwen3 has 128 of its own."""
  for kind, size in (('qwen2', 8), ('qwen3', 128)):
    raw = _hf(kind)
    del raw['head_dim']
    assert architecture.Config.from_hf(raw).head_dim == size


def test_rope_theta_is_read_from_either_place():
  nested = _hf()
  del nested['rope_theta']
  top = _hf()
  del top['rope_parameters']
  for raw in (nested, top):
    assert architecture.Config.from_hf(raw).rope_theta == 500.0


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model_type': 'llama'}, "model_type='llama'; only 'qwen2' or 'qwen3'"),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu'; only 'silu'"),
    ({'layer_types': ['sliding_attention']}, "'sliding_attention'; only"),
    ({'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, 'rope_scaling=.*yarn'),
    ({'rope_parameters': {'full_attention': {}}}, 'rope_parameters=.*only'),
    ({'vocab_size': None}, 'vocab_size=None; it must be a positive whole'),
    ({'num_key_value_heads': 3}, 'num_attention_heads=4 must be a multiple'),
    ({'rope_theta': 7.0}, 'several rope_theta: .*must be the same'),
    ({'head_dim': 7}, 'head_dim=7 must be even'),
    ({'tie_word_embeddings': 1}, 'tie_word_embeddings=1; it must be true or'),
    ({'rope_scaling': 'linear'}, "rope_scaling='linear'; only None"),
    ({'quantization_config': {'bits': 4}}, 'quantization_config=.*only None'),
    ({'model_type': 'qwen3', 'attention_bias': True}, 'attention_bias=True'),
  ],
)
def test_unsupported_config_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    architecture.Config.from_hf(_hf(**changes))


@pytest.mark.parametrize(
  ('heads', 'tensor', 'repeats', 'held'),
  [
    ((16, 2), 1, 1, 2),
    ((16, 2), 2, 1, 1),
    ((16, 2), 8, 4, 1),  # 8 copies on 8 devices.
    ((12, 6), 4, 2, 3),  # 12 on 4 devices: 3 each.
    ((14, 2), 4, 1, 2),  # The query heads do not divide: all of them.
  ],
)
def test_key_heads_of_a_device(heads, tensor, repeats, held):
  config = architecture.Config(64, 64, 64, 1, *heads, 8)
  assert config.key_repeats(tensor) == repeats
  assert config.held_heads(tensor) == held
