"""Device side of a rollout: slots with a KV cache, prefill and decode.

`prefill_prompts` computes the cache of every group's opening. `admit` copies
one into a slot. `decode` samples a fixed number of steps for all slots; a slot
that samples a stop id or spends its budget idles until the call returns.
`prefill` appends the next observation and keeps the cache of earlier turns.
`compact` drops slots that are no longer needed.

One invariant holds between calls: the last id of a slot is *pending*, known but
not yet fed, and the cache holds the `length - 1` ids before it. Feeding the
pending id gives the logits of the next one, so prefill needs no logits. An idle
slot feeds its pending id repeatedly, which writes the same keys and values to
the same place.

Prompts, slots and the rows of `prefill` are sharded alike over the row shards
of the mesh. Groups and slots are indexed *within their shard*, so no cache
moves between devices. Without a mesh there is one shard.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from actfocus_jax.model import architecture, transformer
from actfocus_jax.parallel import mesh as mesh_lib


@flax.struct.dataclass
class Slots:
  """Device state of the episodes that decode together.

  Attributes:
    cache: keys and values of each slot.
    last_B: pending id of each slot.
    length_B: number of ids in the slot, the pending one included.
    budget_B: ids that may still be sampled in this turn; 0: the slot idles.
    row_B: row of the episode; it selects the random stream of the slot.
  """

  cache: transformer.Cache
  last_B: jax.Array
  length_B: jax.Array
  budget_B: jax.Array
  row_B: jax.Array


@flax.struct.dataclass
class Emitted:
  """Ids and log-probs that `decode` sampled; `live_NB` marks the real ones.

  Replicated over the devices, so that every process can read them.
  """

  token_NB: jax.Array
  logprob_NB: jax.Array
  live_NB: jax.Array


def empty(
  config: architecture.Config, batch: int, length: int, dtype, tensor: int = 1
) -> Slots:
  """Return `batch` slots without an episode and with `length` cache positions.

  `tensor` is the size of the mesh axis that splits the cache heads.
  """
  # Separate buffers, because most calls donate their slots.
  last_B, budget_B, row_B = (jnp.zeros((batch,), jnp.int32) for _ in range(3))
  repeat = config.key_repeats(tensor)
  cache = transformer.init_cache(config, batch, length, dtype, repeat)
  return Slots(cache, last_B, jnp.ones_like(last_B), budget_B, row_B)


def slot_shardings(
  mesh: jax.sharding.Mesh, config: architecture.Config
) -> Slots:
  """Return the shardings: slots over data and fsdp, cache heads over tensor.

  If `tensor` does not divide the query heads, the cache is whole on each device
  of that axis.
  """
  is_split = config.num_heads % mesh.shape['tensor'] == 0
  heads_axis = 'tensor' if is_split else None
  cache = NamedSharding(mesh, P(*mesh_lib.ROWS, None, None, heads_axis))
  row = mesh_lib.rows(mesh)
  return Slots(transformer.Cache(cache, cache), row, row, row, row)


@functools.cache
def _empty_on(mesh, config) -> Callable[..., Slots]:
  """Return `empty`, jitted with sharded results, for one mesh and model."""
  make = functools.partial(empty, config, tensor=mesh.shape['tensor'])
  shardings = slot_shardings(mesh, config)
  return jax.jit(make, static_argnums=(0, 1, 2), out_shardings=shardings)


def empty_on(
  mesh: jax.sharding.Mesh,
  config: architecture.Config,
  batch: int,
  length: int,
  dtype,
) -> Slots:
  """Return `empty` slots, created in their `slot_shardings`."""
  return _empty_on(mesh, config)(batch, length, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames=('graphdef', 'config', 'dtype'))
def prefill_prompts(
  graphdef, params, tokens_PT, length_P, *, config: architecture.Config, dtype
) -> Slots:
  """Compute the cache of every group's opening: one slot a group.

  `tokens_PT` holds the ids of the openings, right-padded to the length of the
  cache; `length_P` their true lengths; `dtype` is that of the cache.
  """
  count, T = tokens_PT.shape
  tensor = jax.sharding.get_abstract_mesh().shape.get('tensor', 1)
  slots = empty(config, count, T, dtype, tensor)
  start_P = jnp.zeros((count,), jnp.int32)
  model = nnx.merge(graphdef, params)
  _, cache = model.extend(tokens_PT, start_P, slots.cache, view=T)
  last_P = _pick(tokens_PT, length_P - 1)
  return slots.replace(cache=cache, last_B=last_P, length_B=length_P)


@functools.partial(jax.jit, donate_argnames='slots')
def admit(slots: Slots, prompts: Slots, group_B, row_B, budget_B) -> Slots:
  """Start episodes in the slots whose `group_B` is not -1.

  `group_B` is the index, within the shard, of a slot of `prompts`, which come
  from `prefill_prompts`. `row_B` is the row of the new episode, `budget_B` the
  number of ids in its first response.
  """
  new_B = group_B >= 0
  taken = _of_shard(lambda group_B, prompts: _rows(prompts, group_B))(
    jnp.maximum(group_B, 0), prompts
  )
  width = min(prompts.cache.k_BLSN.shape[2], slots.cache.k_BLSN.shape[2])

  def copy(old_BLSN, prompt_BLSN):
    head = jnp.where(
      new_B[:, None, None, None],
      prompt_BLSN[:, :, :width],
      old_BLSN[:, :, :width],
    )
    return old_BLSN.at[:, :, :width].set(head)

  return Slots(
    cache=jax.tree.map(copy, slots.cache, taken.cache),
    last_B=jnp.where(new_B, taken.last_B, slots.last_B),
    length_B=jnp.where(new_B, taken.length_B, slots.length_B),
    budget_B=jnp.where(new_B, budget_B, slots.budget_B),
    row_B=jnp.where(new_B, row_B, slots.row_B),
  )


@functools.partial(
  jax.jit, static_argnames=('graphdef', 'view'), donate_argnames='slots'
)
def prefill(
  graphdef, params, slots: Slots, tokens_MT, count_M, slot_M, budget_M, *, view
) -> Slots:
  """Append observations to some slots.

  Args:
    graphdef: graph definition of the model.
    params: parameters of the model.
    slots: all slots; donated.
    tokens_MT: new ids, right-padded.
    count_M: number of new ids, at least 1 for a slot that takes part.
    slot_M: index of the slot within its shard; padding rows use an index one
      past the end.
    budget_M: ids that may be sampled in the next turn.
    view: cache positions that attention reads (static). At least the length of
      every slot that takes part, after this call.
  """
  model = nnx.merge(graphdef, params)

  def take(slot_M, slots):
    cut = jax.tree.map(lambda x_BLSN: x_BLSN[:, :, :view], slots.cache)
    return _rows((slots.last_B, slots.length_B, cut), slot_M)

  last_M, length_M, part = _of_shard(take)(slot_M, slots)
  fed_MT = jnp.concatenate([last_M[:, None], tokens_MT[:, :-1]], axis=1)
  _, part = model.extend(fed_MT, length_M - 1, part, view=view)

  def put(slot_M, slots, part, last_M, length_M, budget_M):
    def write(whole, new):
      return whole.at[slot_M].set(new, mode='drop')

    return slots.replace(
      cache=jax.tree.map(
        lambda whole, new: whole.at[slot_M, :, :view].set(new, mode='drop'),
        slots.cache,
        part,
      ),
      last_B=write(slots.last_B, last_M),
      length_B=write(slots.length_B, length_M),
      budget_B=write(slots.budget_B, budget_M),
    )

  last_M, length_M = _pick(tokens_MT, count_M - 1), length_M + count_M
  return _of_shard(put)(slot_M, slots, part, last_M, length_M, budget_M)


@functools.partial(
  jax.jit,
  static_argnames=('graphdef', 'steps', 'view', 'stop_ids', 'ends_early'),
  donate_argnames='slots',
)
def decode(
  graphdef,
  params,
  slots: Slots,
  key,
  temperature,
  *,
  steps,
  view,
  stop_ids,
  ends_early,
) -> tuple[Slots, Emitted]:
  """Sample up to `steps` ids in every slot that has budget.

  The random number of an id depends on `key`, the row of its episode and the
  position of the id. It does not depend on the slot or on other slots.

  Args:
    graphdef: graph definition of the model.
    params: parameters of the model.
    slots: all slots; donated.
    key: PRNG key of this iteration.
    temperature: divides the logits; > 0.
    steps: largest number of ids per slot (static).
    view: cache positions that attention reads (static). At least the length of
      every live slot after this call.
    stop_ids: ids that end a turn (static).
    ends_early: stop as soon as no slot on any device has budget left (static).
      False saves one all-reduce a step, which pays off on a slow network. The
      emitted ids are the same.
  """
  model = nnx.merge(graphdef, params)
  stop_S = jnp.asarray(stop_ids, jnp.int32)
  B = slots.last_B.shape[0]

  def step(carry):
    i, slots, out = carry
    hidden_B1D, cache = model.extend(
      slots.last_B[:, None], slots.length_B - 1, slots.cache, view=view
    )
    logits_BV = model.unembed(hidden_B1D[:, 0]) / temperature
    token_B, logprob_B = _sample(key, slots.row_B, slots.length_B, logits_BV)
    live_B = slots.budget_B > 0
    stop_B = (token_B[:, None] == stop_S[None]).any(axis=1)
    out = Emitted(
      out.token_NB.at[i].set(token_B),
      out.logprob_NB.at[i].set(logprob_B),
      out.live_NB.at[i].set(live_B),
    )
    slots = slots.replace(
      cache=cache,
      last_B=jnp.where(live_B, token_B, slots.last_B),
      length_B=slots.length_B + live_B.astype(jnp.int32),
      budget_B=jnp.where(live_B & ~stop_B, slots.budget_B - 1, 0),
    )
    return i + 1, slots, out

  def unfinished(carry):
    i, slots, _ = carry
    return (i < steps) & (not ends_early or (slots.budget_B > 0).any())

  out = Emitted(
    jnp.zeros((steps, B), jnp.int32),
    jnp.zeros((steps, B), jnp.float32),
    jnp.zeros((steps, B), bool),
  )
  _, slots, out = jax.lax.while_loop(unfinished, step, (0, slots, out))
  return slots, mesh_lib.constrain_replicated(out)


@jax.jit
def compact(slots: Slots, keep_M) -> Slots:
  """Keep the slots at the indices `keep_M` of their shard, in that order."""
  return _of_shard(lambda keep_M, slots: _rows(slots, keep_M))(keep_M, slots)


def _of_shard(move: Callable[..., Any]) -> Callable[..., Any]:
  """Return `move` as each row shard of the ambient mesh applies it locally.

  Indices then count within the shard. Heads stay sharded over `tensor`.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return move
  return jax.shard_map(
    move,
    in_specs=mesh_lib.ROWS,
    out_specs=mesh_lib.ROWS,
    axis_names={'data', 'fsdp'},
  )


def _rows(tree: Any, index_M: jax.Array) -> Any:
  """Return the rows at these indices; one past the end gives the last row."""
  return jax.tree.map(lambda x: jnp.take(x, index_M, axis=0, mode='clip'), tree)


def _sample(key, row_B, position_B, logits_BV):
  """Sample one id per slot; return the ids and their log-probs."""

  def sample(row, position, logits_V):
    id_key = jax.random.fold_in(jax.random.fold_in(key, row), position)
    return jax.random.categorical(id_key, logits_V)

  token_B = jax.vmap(sample)(row_B, position_B, logits_BV).astype(jnp.int32)
  logprob_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32))
  return token_B, _pick(logprob_BV, token_B)


def _pick(x_BN, index_B):
  return jnp.take_along_axis(x_BN, index_B[:, None], axis=1)[:, 0]
