"""The transformer in Flax NNX, used purely: split once, then plain jax.

Embedding, L blocks (norm, attention, norm, MLP, each added to the residual
stream), a last norm and the unembedding. The blocks are one module whose
parameters have a leading layer axis, and `jax.lax.scan` runs over it, so that
compile time does not grow with depth. The family of the config
(`architecture.FAMILIES`) defines which parts a block has.

  graphdef, params = transformer.create(config, mesh, key, dtype=jnp.bfloat16)
  hidden_BTD = nnx.merge(graphdef, params).hidden(tokens_BT)
"""

import functools
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from actfocus_jax.model import architecture, attention
from actfocus_jax.model import embedding as embedding_lib
from actfocus_jax.parallel import mesh as mesh_lib


@flax.struct.dataclass
class Cache:
  """Keys and values of every layer; slot s holds position s of its row.

  Rows come first and the heads are one axis, N = J * C, so that a TPU adds a
  token in place. With layers first, or heads of 64 numbers apart, the cache
  would be copied at both ends of every call and padded to twice its size. If
  the mesh has more devices along `tensor` than there are key heads, each head
  is repeated, so that every device has its own.
  """

  k_BLSN: jax.Array
  v_BLSN: jax.Array


def init_cache(
  config: architecture.Config,
  batch: int,
  length: int,
  dtype: Any,
  repeat: int = 1,
) -> Cache:
  """Return an empty cache: `length` slots for each of `batch` rows.

  `repeat` is the number of copies of each key head, from `Config.key_repeats`.
  """
  heads, size = config.num_key_value_heads * repeat, config.head_dim
  shape = (batch, config.num_layers, length, heads * size)
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class Linear(nnx.Module):
  """y = x @ kernel (+ bias), computed in `dtype`; kernel [in, out]."""

  def __init__(self, shape, *, stddev, bias=False, rngs, param_dtype, dtype):
    init = nnx.initializers.normal(stddev)
    self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
    self.bias = nnx.Param(jnp.zeros(shape[1:], param_dtype)) if bias else None
    self.dtype = dtype

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Return y of the class docstring."""
    y_BTD = x_BTD.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
    if self.bias is None:
      return y_BTD
    return y_BTD + self.bias[...].astype(self.dtype)[None, None, :]


class Norm(nnx.Module):
  """y = x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32."""

  def __init__(self, size, *, eps, param_dtype):
    self.scale = nnx.Param(jnp.ones(size, param_dtype))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return y of the class docstring, in the dtype of x: [..., size]."""
    y = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
    scale = self.scale[...].astype(jnp.float32)
    scale = jnp.expand_dims(scale, range(x.ndim - 1))
    return (y * jax.lax.rsqrt(square + self.eps) * scale).astype(x.dtype)


class Block(nnx.Module):
  """One layer, in two halves, so that a cache can be used between them."""

  def __init__(self, config: architecture.Config, *, rngs, param_dtype, dtype):
    c = config
    linear = functools.partial(
      Linear,
      stddev=c.initializer_range,
      rngs=rngs,
      param_dtype=param_dtype,
      dtype=dtype,
    )
    norm = functools.partial(Norm, eps=c.rms_norm_eps, param_dtype=param_dtype)
    query, key = c.num_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    self.config = c
    self.attention_norm = norm(c.hidden_size)
    self.q = linear((c.hidden_size, query), bias=c.family.qkv_bias)
    self.k = linear((c.hidden_size, key), bias=c.family.qkv_bias)
    self.v = linear((c.hidden_size, key), bias=c.family.qkv_bias)
    self.o = linear((query, c.hidden_size))
    self.q_norm = norm(c.head_dim) if c.family.query_key_norm else None
    self.k_norm = norm(c.head_dim) if c.family.query_key_norm else None
    self.mlp_norm = norm(c.hidden_size)
    self.gate = linear((c.hidden_size, c.intermediate_size))
    self.up = linear((c.hidden_size, c.intermediate_size))
    self.down = linear((c.intermediate_size, c.hidden_size))

  def project(self, x_BTD: jax.Array, rotary: Any) -> tuple[jax.Array, ...]:
    """Returns (q_BTHC, k_BTJC, v_BTJC), queries and keys rotated."""
    shape = (*x_BTD.shape[:2], -1, self.config.head_dim)
    x_BTD = self.attention_norm(x_BTD)
    q, k, v = (
      mesh_lib.constrain_heads(f(x_BTD).reshape(shape))
      for f in (self.q, self.k, self.v)
    )
    if self.config.family.query_key_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    return attention.rotate(q, rotary), attention.rotate(k, rotary), v

  def finish(self, x_BTD: jax.Array, out_BTHC: jax.Array) -> jax.Array:
    """Add the output of attention, then the MLP, to the residual stream."""
    with jax.named_scope('attention'):
      B, T = x_BTD.shape[:2]
      x_BTD = x_BTD + self.o(out_BTHC.reshape(B, T, -1))
    with jax.named_scope('mlp'):
      y_BTD = self.mlp_norm(x_BTD)
      y_BTF = jax.nn.silu(self.gate(y_BTD)) * self.up(y_BTD)
      return mesh_lib.constrain_rows(x_BTD + self.down(y_BTF))


class Transformer(nnx.Module):
  """The model, up to the last norm; `unembed` gives logits where needed.

  With a value head it is a critic: one number per position and no unembedding.

  Attributes:
    config: the architecture.
    dtype: dtype of the computation; the parameters have their own.
    remat: recompute each layer in the backward pass instead of keeping it.
    attention: backend of `hidden`, a key of attention.BACKENDS.
    value_head: [D], maps a hidden state to a value; None for a policy.
  """

  def __init__(
    self,
    config: architecture.Config,
    *,
    rngs: nnx.Rngs,
    param_dtype: Any = jnp.float32,
    dtype: Any = jnp.float32,
    remat: bool = False,
    attention: str = 'xla',
    is_critic: bool = False,
  ):
    c = config
    self.config, self.dtype, self.remat = c, jnp.dtype(dtype), remat
    self.attention = attention
    init = nnx.initializers.normal(c.initializer_range)
    shape = (c.vocab_size, c.hidden_size)
    self.embedding = nnx.Param(init(rngs.params(), shape, param_dtype))

    @nnx.split_rngs(splits=c.num_layers)
    @nnx.vmap
    def stack(rngs):
      return Block(c, rngs=rngs, param_dtype=param_dtype, dtype=dtype)

    self.layers = stack(rngs)
    self.norm = Norm(c.hidden_size, eps=c.rms_norm_eps, param_dtype=param_dtype)
    # Zeros: an untrained critic predicts 0 everywhere.
    zeros = jnp.zeros(c.hidden_size, param_dtype)
    self.value_head = nnx.Param(zeros) if is_critic else None
    if not (c.tie_word_embeddings or is_critic):
      self.head = nnx.Param(init(rngs.params(), shape[::-1], param_dtype))

  def _embed(self, tokens_BT: jax.Array) -> jax.Array:
    """Embed with weights that are sharded by PARTITION_RULES."""
    with jax.named_scope('embed'):
      x_BTD = embedding_lib.embed(self.embedding[...], tokens_BT, self.dtype)
      return mesh_lib.constrain_rows(x_BTD)

  def _embed_decoding(self, tokens_BT: jax.Array) -> jax.Array:
    """Embed with weights in the decode layout, whole along `fsdp`."""
    with jax.named_scope('embed'):
      x_BTD = jnp.take(self.embedding[...], tokens_BT, axis=0)
      return mesh_lib.constrain_rows(x_BTD.astype(self.dtype))

  def hidden(self, tokens_BT: jax.Array) -> jax.Array:
    """Full causal forward pass over positions 0..T-1.

    Rows are padded on the right, so the causal mask is enough: no token sees
    the padding, and the outputs at padding are never read. Padding must be ids
    of the vocabulary too: others give NaN, which no mask can hide (0 * NaN).

    Returns:
      hidden_BTD after the last norm; `unembed` of [:, t] predicts token t+1.
    """
    chex.assert_rank(tokens_BT, 2)
    c = self.config
    position_BT = jnp.broadcast_to(
      jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape
    )
    rotary = attention.rotary(position_BT, c.head_dim, c.rope_theta)
    graphdef, stacked = nnx.split(self.layers)

    def layer(x_BTD, params):
      block = nnx.merge(graphdef, params)
      with jax.named_scope('attention'):
        q, k, v = block.project(x_BTD, rotary)
        out_BTHC = attention.attend_self(q, k, v, backend=self.attention)
      return block.finish(x_BTD, out_BTHC), None

    body = jax.checkpoint(layer, prevent_cse=False) if self.remat else layer
    x_BTD, _ = jax.lax.scan(body, self._embed(tokens_BT), stacked)
    return self.norm(x_BTD)

  def extend(
    self, tokens_BT: jax.Array, start_B: jax.Array, cache: Cache, *, view: int
  ) -> tuple[jax.Array, Cache]:
    """Run T new tokens per row against the cache, and add them to it.

    Row b's tokens take the positions start_b .. start_b+T-1. A row with fewer
    than T real tokens is padded on the right: padding is written past every
    real query, and the row's next call overwrites it. An idle row gets
    start_b = S, because writes past the cache are dropped.

    Args:
      tokens_BT: int32 ids. T = 1 is decoding.
      start_B: int32, the position of each row's first new token.
      cache: keys and values of the positions before.
      view: number of slots, from the first on, that the queries may see. A
        short view saves time; it must cover every position in this call.

    Returns:
      (hidden_BTD of the new tokens, the cache with them written).

    Raises:
      ValueError: if view is not within the length of the cache.
    """
    c, S = self.config, cache.k_BLSN.shape[2]
    B, T = tokens_BT.shape
    if not 0 < view <= S:
      raise ValueError(
        f'view={view} must be within the {S} slots of the cache.'
      )
    position_BT = start_B[:, None] + jnp.arange(T)[None, :]
    rotary = attention.rotary(position_BT, c.head_dim, c.rope_theta)
    graphdef, stacked = nnx.split(self.layers)
    keys = c.num_key_value_heads * c.head_dim
    repeat = cache.k_BLSN.shape[3] // keys

    def write(cache_BLSN, i, new_BTJC):
      new_BTJC = mesh_lib.constrain_heads(jnp.repeat(new_BTJC, repeat, axis=2))
      # A scatter: one slice update per row was 3 to 8 times slower on CPU. With
      # vmap the compiler treats rows as independent; with an index of the row
      # every device would receive the new keys of all rows.
      new_BTN = new_BTJC.reshape(B, T, -1).astype(cache_BLSN.dtype)
      cache_BLSN = jax.vmap(
        lambda row_LSN, position_T, new_TN: row_LSN.at[i, position_T].set(
          new_TN, mode='drop'
        )
      )(cache_BLSN, position_BT, new_BTN)
      size = (B, 1, view, new_BTN.shape[2])
      seen_B1SN = jax.lax.dynamic_slice(cache_BLSN, (0, i, 0, 0), size)
      return cache_BLSN, seen_B1SN.reshape(B, view, *new_BTJC.shape[2:])

    def layer(carry, params):
      x_BTD, k_BLSN, v_BLSN, i = carry
      block = nnx.merge(graphdef, params)
      with jax.named_scope('attention'):
        q, k, v = block.project(x_BTD, rotary)
        k_BLSN, k = write(k_BLSN, i, k)
        v_BLSN, v = write(v_BLSN, i, v)
        out_BTHC = attention.attend(q, k, v, position_BT)
      return (block.finish(x_BTD, out_BTHC), k_BLSN, v_BLSN, i + 1), None

    # As a carry the cache is updated in place; as xs and ys it would be copied
    # at every step.
    carry = (self._embed_decoding(tokens_BT), cache.k_BLSN, cache.v_BLSN, 0)
    (x_BTD, k_BLSN, v_BLSN, _), _ = jax.lax.scan(layer, carry, stacked)
    return self.norm(x_BTD), Cache(k_BLSN, v_BLSN)

  def unembedding(self) -> jax.Array:
    """Return table_DV in float32: the transposed embedding, if tied."""
    return self._table().astype(jnp.float32)

  def _table(self) -> jax.Array:
    tied = self.config.tie_word_embeddings
    return self.embedding[...].T if tied else self.head[...]

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Return float32 logits [..., V] of hidden states [..., D].

    Both operands are float32; on TPU and GPU `jax_default_matmul_precision`
    sets the precision of the product. If both have the same shorter type, they
    are multiplied in it and summed in float32: the same numbers, without a
    float32 copy of the table.
    """
    with jax.named_scope('unembed'):
      table_DV = self._table()
      if hidden.dtype != table_DV.dtype:
        hidden, table_DV = (x.astype(jnp.float32) for x in (hidden, table_DV))
      return jnp.matmul(hidden, table_DV, preferred_element_type=jnp.float32)

  def value(self, hidden: jax.Array) -> jax.Array:
    """Return float32 values [...] of hidden states [..., D]; critics only."""
    with jax.named_scope('value'):
      head = self.value_head[...].astype(jnp.float32)
      return hidden.astype(jnp.float32) @ head


# Sharding of each parameter. The first axis under `layers` is the layer; heads
# and hidden units are split over `tensor`, so a block needs one sum per half.
PARTITION_RULES = (
  (r'(^|/)embedding$', embedding_lib.TABLE_SPEC),
  (r'layers/(q|k|v|gate|up)/kernel$', P(None, 'fsdp', 'tensor')),
  (r'layers/(q|k|v)/bias$', P(None, 'tensor')),
  (r'layers/(o|down)/kernel$', P(None, 'tensor', 'fsdp')),
  (r'norm/scale$', P()),
  (r'(^|/)head$', P('fsdp', 'tensor')),
  (r'(^|/)value_head$', P()),
)


def abstract(
  config: architecture.Config, dtype: Any, **kwargs: Any
) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns (graphdef, params of ShapeDtypeStructs); allocates nothing.

  `kwargs` are param_dtype, remat, attention and is_critic of Transformer.
  """
  make = functools.partial(Transformer, config, dtype=dtype, **kwargs)
  model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
  return nnx.split(model, nnx.Param)


def create(
  config: architecture.Config,
  mesh: Mesh,
  key: jax.Array,
  *,
  dtype: Any,
  **kwargs: Any,
) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns (graphdef, params), the parameters created sharded.

  Kernels and embeddings are N(0, initializer_range), norms 1, biases 0. They
  are sharded by PARTITION_RULES and depend on the key, not on the mesh.
  `kwargs` are param_dtype, remat, attention and is_critic of Transformer.
  """
  graphdef, shapes = abstract(config, dtype, **kwargs)
  shardings = mesh_lib.param_shardings(mesh, PARTITION_RULES, shapes)

  def init(key: jax.Array) -> nnx.State:
    model = Transformer(config, rngs=nnx.Rngs(key), dtype=dtype, **kwargs)
    return nnx.state(model, nnx.Param)

  return graphdef, jax.jit(init, out_shardings=shardings)(key)


def critic_from(params: nnx.State, shapes: nnx.State) -> nnx.State:
  """Return critic parameters copied from a policy, with a zero value head.

  Copied, because both models are trained and donated. `shapes` are those of the
  critic, from `abstract(..., is_critic=True)`.
  """
  policy = {
    mesh_lib.path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  sharding = jax.tree.leaves(params)[0].sharding

  def leaf(path, shape):
    name = mesh_lib.path_name(path)
    if name != 'value_head':
      chex.assert_equal_shape((policy[name], shape))
      return jnp.copy(policy[name])
    replicated = NamedSharding(sharding.mesh, P())
    return jnp.zeros(shape.shape, shape.dtype, device=replicated)

  return jax.tree_util.tree_map_with_path(leaf, shapes)
