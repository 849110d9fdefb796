"""The train state: what an optimizer step reads and writes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec


@flax.struct.dataclass
class ModelState:
  """A model that is being trained.

  Attributes:
    params: Master weights, float32.
    opt_state: Of its optimizer.
  """

  params: Any
  opt_state: Any


@flax.struct.dataclass
class TrainState:
  """Everything that changes in training, and nothing else.

  Attributes:
    step: Finished iterations of the loop, int32.
    skipped: Iterations without an update, because no group had spread, int32.
    streak: How many of the latest iterations in a row were skipped, int32.
    actor: The policy.
    critic: Of PPO; None without one.
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

  Args:
    learning_rate: Constant, or a schedule over optimizer steps.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    weight_decay: Of matrices; vectors (norms, biases) are not decayed.
    clip_norm: Largest norm of the whole gradient.
    warmup_steps: n optimizer steps over which a constant rate rises: the k-th
      has k / n of it, so the first one moves something too.

  Returns:
    The optax transformation.
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


def trained(params, tx: optax.GradientTransformation) -> ModelState:
  """Puts a fresh optimizer beside parameters that are where they belong.

  The optimizer's moments take the parameters' shardings, scalars are
  replicated.

  Args:
    params: Sharded master weights.
    tx: From `optimizer`.

  Returns:
    The two. It shares the parameters' buffers.
  """
  init = jax.jit(tx.init, out_shardings=_opt_shardings(params, tx))
  return ModelState(params, init(params))


def abstract_trained(params, tx: optax.GradientTransformation) -> ModelState:
  """What `trained` would make, as shapes, dtypes and shardings.

  Args:
    params: ShapeDtypeStructs with shardings.
    tx: From `optimizer`.
  """
  shapes, where = jax.eval_shape(tx.init, params), _opt_shardings(params, tx)
  return ModelState(params, jax.tree.map(_placed, shapes, where))


def create(actor: ModelState, critic: ModelState | None = None) -> TrainState:
  """A fresh state at step 0 around models from `trained`."""
  everywhere = _everywhere(actor.params)
  # Three buffers, not one named thrice: the step donates its state.
  counts = (jnp.zeros((), jnp.int32, device=everywhere) for _ in range(3))
  return TrainState(*counts, actor, critic)


def abstract(actor: ModelState, critic: ModelState | None = None) -> TrainState:
  """What `create` would make, to restore a checkpoint into.

  Args:
    actor: From `abstract_trained`.
    critic: From `abstract_trained`, or None.

  Returns:
    A state of ShapeDtypeStructs; nothing is allocated.
  """
  count = _placed(jnp.zeros((), jnp.int32), _everywhere(actor.params))
  return TrainState(count, count, count, actor, critic)


def _placed(x, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _opt_shardings(params, tx: optax.GradientTransformation):
  """The parameters' shardings wherever the state has a tree like theirs.

  A moment starts as zeros, which depend on no parameter: left to itself the
  compiler gives every device a whole one.
  """
  where = jax.tree.map(lambda x: x.sharding, params)

  def is_like_params(tree):
    return jax.tree.structure(tree) == jax.tree.structure(params)

  return jax.tree.map(
    lambda tree: where if is_like_params(tree) else _everywhere(params),
    jax.eval_shape(tx.init, params),
    is_leaf=is_like_params,
  )


def _everywhere(params) -> jax.sharding.Sharding:
  """The sharding of scalars beside these parameters."""
  sharding = jax.tree.leaves(params)[0].sharding
  if not isinstance(sharding, NamedSharding):
    return sharding
  return NamedSharding(sharding.mesh, PartitionSpec())


def _matrices(params):
  # Stacked layers: a norm's scale has two axes there, [L, D].
  def is_matrix(path, x):
    return x.ndim - _is_stacked(path) >= 2

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def _is_stacked(path) -> int:
  return int(getattr(path[0], 'key', None) == 'layers')
