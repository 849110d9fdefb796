"""Architecture of a model: sizes and switches, from and to config.json.

One transformer (`transformer.py`) runs every family; a family is a Hugging Face
`model_type` and defines which parts the model has. Anything else that a
config.json requests is refused, never ignored. Nothing here imports jax, so an
unsupported model is refused at once.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from actfocus_jax.parallel import mesh_shapes


@dataclasses.dataclass(frozen=True)
class Family:
  """Properties that all models of one `model_type` share.

  Attributes:
    class_name: the class in transformers that reads their config.json.
    qkv_bias: true if the projections to queries, keys and values have biases.
    query_key_norm: true if every head's queries and keys are normalised
      before they are rotated.
    head_dim: head size if config.json has none; None: hidden_size divided by
      the number of heads.
    required: fields of config.json that would change the computation, beside
      those of `_REQUIRED`, and the value that is supported.
  """

  class_name: str
  qkv_bias: bool
  query_key_norm: bool
  head_dim: int | None = None
  required: tuple[tuple[str, Any], ...] = ()


FAMILIES = {
  # Qwen2 and Qwen2.5, arXiv 2407.10671 and 2412.15115.
  'qwen2': Family('Qwen2ForCausalLM', qkv_bias=True, query_key_norm=False),
  # Qwen3 dense, arXiv 2505.09388.
  'qwen3': Family(
    'Qwen3ForCausalLM',
    qkv_bias=False,
    query_key_norm=True,
    head_dim=128,
    required=(('attention_bias', False),),
  ),
}

# Name of our field -> (name in config.json, default of transformers; None: the
# field is required).
_FIELDS = {
  'vocab_size': ('vocab_size', None),
  'hidden_size': ('hidden_size', None),
  'intermediate_size': ('intermediate_size', None),
  'num_layers': ('num_hidden_layers', None),
  'num_heads': ('num_attention_heads', None),
  'rms_norm_eps': ('rms_norm_eps', 1e-6),
  'tie_word_embeddings': ('tie_word_embeddings', False),
  'max_position_embeddings': ('max_position_embeddings', 32768),
  'initializer_range': ('initializer_range', 0.02),
}
# Fields that would change the computation of any family, and supported values.
_REQUIRED = {
  'hidden_act': 'silu',
  'use_sliding_window': False,
  'attention_dropout': 0.0,
  'is_causal': True,
  'partial_rotary_factor': 1.0,
  'quantization_config': None,
}
# Those that transformers writes for every family.
_WRITTEN = ('hidden_act', 'use_sliding_window', 'attention_dropout')


@dataclasses.dataclass(frozen=True)
class Config:
  """The architecture. Sizes count units; `rope_theta` is the rotary base.

  Raises:
    ValueError: if a field has another type or is not positive, the head size
      is odd, the query heads are not a multiple of the key heads, or
      `model_type` is not a supported family.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_key_value_heads: int
  head_dim: int
  rope_theta: float = 1e6
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = True
  max_position_embeddings: int = 32768
  initializer_range: float = 0.02
  model_type: str = 'qwen2'

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      _check_value(field.name, field.type, getattr(self, field.name))
    if self.model_type not in FAMILIES:
      raise ValueError(_unsupported('model_type', self.model_type, FAMILIES))
    if self.head_dim % 2:
      raise ValueError(f'head_dim={self.head_dim} must be even: rotary halves.')
    if self.num_heads % self.num_key_value_heads:
      raise ValueError(
        f'num_attention_heads={self.num_heads} must be a multiple of'
        f' num_key_value_heads={self.num_key_value_heads}.'
      )

  @property
  def family(self) -> Family:
    """Family of the `model_type`."""
    return FAMILIES[self.model_type]

  @property
  def splits(self) -> tuple[mesh_shapes.Split, ...]:
    """Sizes that `transformer.PARTITION_RULES` split, and their mesh axes."""
    query = self.num_heads * self.head_dim
    key = self.num_key_value_heads * self.head_dim
    sizes = (
      ('hidden_size', self.hidden_size, 'fsdp'),
      ('vocab_size', self.vocab_size, 'tensor'),
      ('intermediate_size', self.intermediate_size, 'tensor'),
      ('num_attention_heads * head_dim', query, 'tensor'),
      ('num_key_value_heads * head_dim', key, 'tensor'),
    )
    return tuple(mesh_shapes.Split(*size, (axis,)) for *size, axis in sizes)

  def key_repeats(self, tensor: int) -> int:
    """Returns `key_repeats` for the heads of this model."""
    return key_repeats(self.num_heads, self.num_key_value_heads, tensor)

  def held_heads(self, tensor: int) -> int:
    """Return the number of cached key heads on each of `tensor` devices."""
    if self.num_heads % tensor:
      return self.num_key_value_heads
    return self.num_key_value_heads * self.key_repeats(tensor) // tensor

  @property
  def num_parameters(self) -> int:
    """Number of parameters; tied embeddings count once."""
    query = self.num_heads * self.head_dim
    key = self.num_key_value_heads * self.head_dim
    layer = 2 * self.hidden_size * (query + key) + 2 * self.hidden_size
    layer += 3 * self.hidden_size * self.intermediate_size
    layer += query + 2 * key if self.family.qkv_bias else 0
    layer += 2 * self.head_dim if self.family.query_key_norm else 0
    tables = 1 if self.tie_word_embeddings else 2
    table = self.vocab_size * self.hidden_size
    return self.num_layers * layer + tables * table + self.hidden_size

  @classmethod
  def from_hf(cls, raw: Mapping[str, Any]) -> 'Config':
    """Read the dict of a Hugging Face config.json.

    Raises:
      ValueError: if a field is missing or requests an unsupported computation;
        names the field, its value and what is allowed.
    """
    family = _check_supported(raw)
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    fields = {}
    for ours, (theirs, default) in _FIELDS.items():
      fields[ours] = raw.get(theirs, default)
      _check_value(f'config.json has {theirs}', kinds[ours], fields[ours])
    heads, width = fields['num_heads'], fields['hidden_size']
    if 'num_key_value_heads' not in raw:
      raise ValueError(
        'config.json lacks num_key_value_heads; allowed: a positive whole '
        'number, or null for as many as num_attention_heads.'
      )
    return cls(
      model_type=raw['model_type'],
      num_key_value_heads=raw['num_key_value_heads'] or heads,
      head_dim=raw.get('head_dim') or family.head_dim or width // heads,
      rope_theta=_rope_theta(raw),
      **fields,
    )

  def to_hf(self) -> dict[str, Any]:
    """Return the config.json dict that transformers and vLLM read."""
    named = {k: getattr(self, ours) for ours, (k, _) in _FIELDS.items()}
    required = {name: _REQUIRED[name] for name in _WRITTEN}
    required |= dict(self.family.required)
    # The base is written twice: transformers 5 reads the second place, older
    # versions the first.
    rope = {'rope_type': 'default', 'rope_theta': self.rope_theta}
    same = ('num_key_value_heads', 'head_dim', 'rope_theta')
    return {
      'architectures': [self.family.class_name],
      'model_type': self.model_type,
      **required,
      **named,
      **{name: getattr(self, name) for name in same},
      'rope_parameters': rope,
    }


def _check_value(name: str, kind: type, value: Any) -> None:
  """Raise ValueError unless a field has its type, and numbers are above 0."""
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  is_right, words = {
    int: (
      is_number and isinstance(value, int) and value > 0,
      'a positive whole number',
    ),
    float: (is_number and value > 0, 'a positive number'),
    bool: (isinstance(value, bool), 'true or false'),
    str: (isinstance(value, str), 'a text'),
  }[kind]
  if not is_right:
    raise ValueError(f'{name}={value!r}; it must be {words}.')


def _unsupported(field: str, value: Any, allowed: Any) -> str:
  names = ' or '.join(map(repr, allowed))
  return f'config.json has {field}={value!r}; only {names} is supported.'


def _check_supported(raw: Mapping[str, Any]) -> Family:
  """Return the family; ValueError for an unsupported computation."""
  kind = raw.get('model_type')
  if kind not in FAMILIES:
    raise ValueError(_unsupported('model_type', kind, FAMILIES))
  family = FAMILIES[kind]
  for field, needed in (_REQUIRED | dict(family.required)).items():
    value = raw.get(field, needed)
    if value != needed:
      raise ValueError(_unsupported(field, value, [needed]))
  for layer in raw.get('layer_types') or ():
    if layer != 'full_attention':
      raise ValueError(_unsupported('layer_types', layer, ['full_attention']))
  return family


def _rope_theta(raw: Mapping[str, Any]) -> float:
  """Return the rotary base, from any of its places in a config.

  Raises:
    ValueError: if positions are scaled, or differ between layers.
  """
  named = {raw['rope_theta']} if 'rope_theta' in raw else set()
  for field in ('rope_scaling', 'rope_parameters'):
    rope = raw.get(field) or {}
    if not isinstance(rope, Mapping):
      raise ValueError(_unsupported(field, rope, [None]))
    kind = rope.get('rope_type', rope.get('type', 'default'))
    # transformers 5 also writes this factor, 1.0 if a whole head is rotated.
    others = set(rope) - {'rope_type', 'type', 'rope_theta'}
    if rope.get('partial_rotary_factor') == 1.0:
      others.discard('partial_rotary_factor')
    if kind != 'default' or others:
      raise ValueError(
        f"config.json has {field}={dict(rope)!r}; only rope_type 'default' with"
        ' a rope_theta, the same for all layers, is supported.'
      )
    named |= {rope['rope_theta']} if 'rope_theta' in rope else set()
  if len(named) > 1:
    raise ValueError(
      f'config.json has several rope_theta: {", ".join(map(str, named))};'
      ' they must be the same.'
    )
  (theta,) = named or {10000.0}
  _check_value('config.json has rope_theta', float, theta)
  return float(theta)


def key_repeats(heads: int, key_heads: int, tensor: int) -> int:
  """Return how often key heads are repeated to split over `tensor` devices.

  The smallest number that lets the devices share the key heads evenly, each
  query head with its key head; 1 if the query heads cannot be split.
  """
  if heads % tensor:
    return 1
  return tensor // math.gcd(key_heads, tensor)
