"""Train state: what an optimizer step reads and writes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec


@flax.struct.dataclass
class ModelState:
  """Master weights of a model, float32, and the state of its optimizer."""

  params: Any
  opt_state: Any


@flax.struct.dataclass
class TrainState:
  """Everything that changes in training, and nothing else.

  Attributes:
    step: finished iterations of the loop, int32.
    skipped: iterations without an update, because no group had spread, int32.
    streak: number of latest iterations in a row that were skipped, int32.
    actor: the policy.
    critic: critic of PPO; None without one.
  """

  step: jax.Array
  skipped: jax.Array
  streak: jax.Array
  actor: ModelState
  critic: ModelState | None = None


def optimizer(
  *,
  learning_rate: float | optax.Schedule,
  b1: float,
  b2: float,
  weight_decay: float,
  clip_norm: float,
  warmup_steps: int = 0,
) -> optax.GradientTransformation:
  """AdamW behind a clip by global norm (Loshchilov & Hutter 2019).

  Vectors (norms, biases) are not decayed. A constant rate rises over n =
  `warmup_steps` optimizer steps: the k-th has k / n of it, so the first one
  moves something too. `clip_norm` is the largest norm of the whole gradient.
  """
  if warmup_steps:
    learning_rate = optax.linear_schedule(
      learning_rate / warmup_steps, learning_rate, warmup_steps - 1
    )
  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(
      learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_matrices
    ),
  )


def create_model_state(params, tx: optax.GradientTransformation) -> ModelState:
  """Return sharded parameters with the fresh state of their optimizer.

  The optimizer's moments take the parameters' shardings, scalars are
  replicated. The result shares the buffers of `params`.
  """
  init = jax.jit(tx.init, out_shardings=_opt_shardings(params, tx))
  return ModelState(params, init(params))


def abstract_model_state(
  params, tx: optax.GradientTransformation
) -> ModelState:
  """`create_model_state` of ShapeDtypeStructs with shardings."""
  shapes = jax.eval_shape(tx.init, params)
  shardings = _opt_shardings(params, tx)
  return ModelState(params, jax.tree.map(_placed, shapes, shardings))


def create(actor: ModelState, critic: ModelState | None = None) -> TrainState:
  """Fresh state at step 0 around models from `create_model_state`."""
  everywhere = _everywhere(actor.params)
  # Three buffers, not one with three names: the step donates its state.
  counts = (jnp.zeros((), jnp.int32, device=everywhere) for _ in range(3))
  return TrainState(*counts, actor, critic)


def abstract(actor: ModelState, critic: ModelState | None = None) -> TrainState:
  """`create` of abstract models, to restore a checkpoint into."""
  count = _placed(jnp.zeros((), jnp.int32), _everywhere(actor.params))
  return TrainState(count, count, count, actor, critic)


def _placed(x, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _opt_shardings(params, tx: optax.GradientTransformation):
  """Parameters' shardings wherever the optimizer state has a tree like theirs.

  A moment starts as zeros, which depend on no parameter: without this the
  compiler gives every device a whole one.
  """
  shardings = jax.tree.map(lambda x: x.sharding, params)

  def is_like_params(tree):
    return jax.tree.structure(tree) == jax.tree.structure(params)

  return jax.tree.map(
    lambda tree: shardings if is_like_params(tree) else _everywhere(params),
    jax.eval_shape(tx.init, params),
    is_leaf=is_like_params,
  )


def _everywhere(params) -> jax.sharding.Sharding:
  """Sharding of scalars beside these parameters."""
  sharding = jax.tree.leaves(params)[0].sharding
  if not isinstance(sharding, NamedSharding):
    return sharding
  return NamedSharding(sharding.mesh, PartitionSpec())


def _matrices(params):
  def is_matrix(path, x):
    # Stacked layers: a norm's scale has two axes there, [L, D].
    is_stacked = getattr(path[0], 'key', None) == 'layers'
    return x.ndim - is_stacked >= 2

  return jax.tree_util.tree_map_with_path(is_matrix, params)
