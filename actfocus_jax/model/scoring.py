"""Scores of tokens under a model: log-probabilities, energies, values.

One forward pass gives hidden states, which are cut into pieces of a few
positions. The logits of one piece are computed, reduced to a few numbers per
token and dropped, and recomputed in the backward pass, so [B, T, V] never
exists. This is the only place where predictions are shifted by one.
"""

import functools
from collections.abc import Callable

import chex
import flax
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from actfocus_jax.parallel import mesh as mesh_lib

_PIECE_ROWS = 8


@flax.struct.dataclass
class Scores:
  """Scores of token t given the tokens before it; 0 at t = 0 and at padding.

  Attributes:
    logprob_BT: log p(token_t) at the given temperature, in nats.
    raw_logprob_BT: the same at temperature 1; signals are computed from it.
    logsumexp_BT: logsumexp of the raw logits; the energy is minus this
      (arXiv 2605.14558, section on token energy).
    mean_logit_BT: mean of the raw logits over the vocabulary.
    entropy_BT: entropy of the raw distribution, in nats.
  """

  logprob_BT: jax.Array
  raw_logprob_BT: jax.Array
  logsumexp_BT: jax.Array
  mean_logit_BT: jax.Array
  entropy_BT: jax.Array


def reduce_logits(
  logits_BTV: jax.Array, target_BT: jax.Array, *, temperature: float
) -> Scores:
  """Reduce logits to the scores of the tokens they predict.

  `logits_BTV[:, t]`, float32, predicts `target_BT[:, t]`: already shifted. The
  temperature divides the logits of the log-probability, of nothing else.
  """
  chex.assert_shape(target_BT, logits_BTV.shape[:2])
  logsumexp_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  logprob_BTV = logits_BTV - logsumexp_BT[:, :, None]
  target_BT1 = target_BT[:, :, None]
  chosen_BT = jnp.take_along_axis(logits_BTV, target_BT1, axis=-1)[:, :, 0]
  return Scores(
    logprob_BT=chosen_BT / temperature
    - jax.nn.logsumexp(logits_BTV / temperature, axis=-1),
    raw_logprob_BT=chosen_BT - logsumexp_BT,
    logsumexp_BT=logsumexp_BT,
    mean_logit_BT=jnp.mean(logits_BTV, axis=-1),
    entropy_BT=-jnp.sum(jnp.exp(logprob_BTV) * logprob_BTV, axis=-1),
  )


def score_tokens(
  graphdef: nnx.GraphDef,
  params: nnx.State,
  tokens_BT: jax.Array,
  valid_BT: jax.Array,
  *,
  temperature: float = 1.0,
  chunk: int = 512,
) -> Scores:
  """Return the scores of every token; differentiable in the parameters.

  Args:
    graphdef: graph definition of a Transformer.
    params: parameters of the model.
    tokens_BT: int32 ids, rows padded on the right.
    valid_BT: bool, False at padding.
    temperature: divides the logits of the log-probability only; logsumexp and
      entropy use the raw logits.
    chunk: tokens that have logits at one time in one block of rows (at least
      one position of each row). Under `jax.set_mesh` a block is the rows of one
      row shard; without, it is the batch. Memory: a few times chunk * V floats.

  Raises:
    ValueError: if temperature or chunk is not positive.
  """
  _check_numbers(temperature, chunk)
  chex.assert_equal_shape((tokens_BT, valid_BT))
  model = nnx.merge(graphdef, params)
  # The shift by one: the hidden state at t - 1 predicts token t.
  hidden_BTD = model.hidden(tokens_BT)[:, :-1]
  target_BT = tokens_BT[:, 1:]
  score = functools.partial(_in_pieces, temperature=temperature, chunk=chunk)
  scores = _per_row_block(score)(model.unembedding(), hidden_BTD, target_BT)
  return jax.tree.map(lambda x_BT: _align(x_BT, valid_BT), scores)


def score_some(
  graphdef: nnx.GraphDef,
  params: nnx.State,
  tokens_BT: jax.Array,
  valid_BT: jax.Array,
  mask_BT: jax.Array,
  *,
  temperature: float = 1.0,
  chunk: int = 512,
) -> Scores:
  """Return the scores of some tokens; 0 at all others. Not differentiable.

  Every token goes through the layers, but only those of `mask_BT` through the
  unembedding. Its work grows with their number, which is not static. The other
  arguments are those of `score_tokens`.

  Raises:
    ValueError: if temperature or chunk is not positive.
  """
  _check_numbers(temperature, chunk)
  chex.assert_equal_shape((tokens_BT, valid_BT, mask_BT))
  model = nnx.merge(graphdef, params)
  hidden_BTD = model.hidden(tokens_BT)[:, :-1]
  score = functools.partial(_marked, temperature=temperature, chunk=chunk)
  scores = _per_row_block(score)(
    model.unembedding(),
    hidden_BTD,
    tokens_BT[:, 1:],
    (mask_BT & valid_BT)[:, 1:],
  )
  return jax.tree.map(lambda x_BT: _align(x_BT, valid_BT), scores)


def value_tokens(
  graphdef: nnx.GraphDef,
  params: nnx.State,
  tokens_BT: jax.Array,
  valid_BT: jax.Array,
) -> jax.Array:
  """Return value_BT, the critic's value before token t, in float32.

  A function of the tokens before t; 0 at t = 0 and at padding. Differentiable
  in the parameters. The arguments are those of `score_tokens`.
  """
  chex.assert_equal_shape((tokens_BT, valid_BT))
  model = nnx.merge(graphdef, params)
  # The same shift by one as above.
  return _align(model.value(model.hidden(tokens_BT)[:, :-1]), valid_BT)


def _check_numbers(temperature: float, chunk: int) -> None:
  if not temperature > 0 or chunk < 1:
    raise ValueError(
      f'temperature={temperature} and chunk={chunk} must be positive.'
    )


def _align(x_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
  """Put a 0 before scores that start at token 1, and zeros at padding."""
  return jnp.where(valid_BT, jnp.pad(x_BT, ((0, 0), (1, 0))), 0.0)


def _per_row_block(score: Callable[..., Scores]) -> Callable[..., Scores]:
  """Returns `score` as each row shard of the ambient mesh applies it locally.

  Left to the compiler, the backward pass gathers the unembedding and sums its
  gradient over the devices once per piece; here it does so once per call.
  """
  mesh, axes = jax.sharding.get_abstract_mesh(), ('data', 'fsdp')

  def block(table_DV, *rows):
    # Copied before the pieces, so that its gradient is summed after them.
    table_DV = jax.lax.pcast(table_DV, axes, to='varying')
    return score(table_DV, *rows)

  def wrapped(table_DV, *rows):
    # One block needs no shard_map (and XLA fails at sums over manual axes of
    # size 1 beside a `tensor` axis).
    shards = 1 if mesh.empty else mesh_lib.row_shards(mesh)
    if shards == 1 or rows[0].shape[0] % shards:
      return score(table_DV, *rows)
    specs = (P(), *(mesh_lib.ROWS for _ in rows))
    return jax.shard_map(
      block, in_specs=specs, out_specs=mesh_lib.ROWS, axis_names=set(axes)
    )(table_DV, *rows)

  return wrapped


def _in_pieces(
  table_DV: jax.Array,
  hidden_BTD: jax.Array,
  target_BT: jax.Array,
  *,
  temperature: float,
  chunk: int,
) -> Scores:
  """Score all positions of a block, the logits of one piece at a time."""
  B, T = target_BT.shape
  width = max(1, min(chunk // B, T))
  pieces = -(-T // width)

  def cut(x):
    """[B, T, ...] -> [pieces, B, width, ...], padded to whole pieces."""
    pad = [(0, 0), (0, pieces * width - T)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(B, pieces, width, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  @jax.checkpoint
  def piece(inputs):
    hidden_BTD, target_BT = inputs
    with jax.named_scope('unembed'):
      logits_BTV = hidden_BTD.astype(jnp.float32) @ table_DV
    return reduce_logits(logits_BTV, target_BT, temperature=temperature)

  scores = jax.lax.map(piece, (cut(hidden_BTD), cut(target_BT)))
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T], scores
  )


def _marked(
  table_DV: jax.Array,
  hidden_BTD: jax.Array,
  target_BT: jax.Array,
  mask_BT: jax.Array,
  *,
  temperature: float,
  chunk: int,
) -> Scores:
  """Score the marked positions of a block, `chunk` of them at a time."""
  size = mask_BT.size
  # Pieces have several rows: on CPU one row of many tokens takes twice as long.
  rows = min(_PIECE_ROWS, chunk, max(size, 1))
  width = rows * max(1, min(chunk, size) // rows)
  hidden_ND = hidden_BTD.reshape(size, hidden_BTD.shape[-1])
  target_N, mask_N = target_BT.reshape(-1), mask_BT.reshape(-1)
  # Marked positions first; the filling of the last piece is dropped below.
  order_N = jnp.argsort(~mask_N, stable=True)
  order_N = jnp.pad(order_N, (0, -size % width), constant_values=size)

  def piece(i, scores):
    index_C = jax.lax.dynamic_slice(order_N, (i * width,), (width,))
    index_RC = index_C.reshape(rows, -1)
    hidden_RCD = jnp.take(hidden_ND, index_RC, axis=0, mode='clip')
    target_RC = jnp.take(target_N, index_RC, mode='clip')
    with jax.named_scope('unembed'):
      logits_RCV = hidden_RCD.astype(jnp.float32) @ table_DV
    new_scores = reduce_logits(logits_RCV, target_RC, temperature=temperature)
    return jax.tree.map(
      lambda x_N, new_RC: x_N.at[index_RC].set(new_RC, mode='drop'),
      scores,
      new_scores,
    )

  # Zeros computed from the input, so that shard_map sees them vary with it.
  zero_N = jnp.zeros_like(hidden_ND, jnp.float32, shape=(size,))
  zero_N = zero_N + 0.0 * hidden_ND[:, 0].astype(jnp.float32)
  fields = Scores.__dataclass_fields__
  if not size:
    return Scores(**dict.fromkeys(fields, zero_N.reshape(mask_BT.shape)))
  count = jnp.sum(mask_N, dtype=jnp.int32)
  scores = jax.lax.fori_loop(
    0, -(-count // width), piece, Scores(**dict.fromkeys(fields, zero_N))
  )
  return jax.tree.map(
    lambda x_N: jnp.where(mask_N, x_N, 0.0).reshape(mask_BT.shape), scores
  )
