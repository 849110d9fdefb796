"""The device side of a rollout: slots with a KV cache, prefill and decode.

The life of one slot:

1. `prefill_prompts` reads the opening of every group once.
2. `admit` copies a group's cache into the slot of one of its members.
3. `decode` samples a fixed number of steps for all slots at once. A slot that
   samples a stop id, or spends its budget, idles until the call returns.
4. `prefill` appends the next observation; the cache of all earlier turns
   stays where it is. Then 3 again, until the episode is over.
5. `compact` drops the slots that nobody needs any more.

One invariant makes every step the same: the last id of a slot is always
*pending*, that is known but not yet fed. The cache holds the `length - 1` ids
before it. Feeding the pending id gives the logits of the next one, so prefill
needs no logits, and a slot that idles feeds its pending id again and again,
which writes the same keys and values to the same place.

An episode stays on the devices that it began on. Prompts, slots and the rows of
`prefill` are spread over the row shards of the mesh alike, and a group or slot
is named by its place *within its shard*, so that no cache ever moves between
devices. Without a mesh there is one shard.
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
from actfocus_jax.parallel import mesh as meshes


@flax.struct.dataclass
class Slots:
  """Rows that decode together.

  Attributes:
    cache: Keys and values of each slot.
    last_B: The pending id of each slot.
    length_B: Ids in the slot, the pending one included.
    budget_B: Ids that may still be sampled in this turn; 0 idles.
    row_B: Index of the episode; it names the slot's random stream.
  """

  cache: transformer.Cache
  last_B: jax.Array
  length_B: jax.Array
  budget_B: jax.Array
  row_B: jax.Array


@flax.struct.dataclass
class Emitted:
  """What `decode` sampled: `[steps, B]`, `live` marks what counts.

  Every device holds all of it, so that every process can read it.
  """

  token_NB: jax.Array
  logprob_NB: jax.Array
  live_NB: jax.Array


def empty(
  config: architecture.Config, batch: int, length: int, dtype, tensor: int = 1
) -> Slots:
  """Slots without an episode.

  Args:
    config: Of the model.
    batch: B.
    length: S.
    dtype: Of the cache.
    tensor: Size of the mesh axis over which the heads of the cache go.

  Returns:
    The slots.
  """
  # Buffers of their own: most calls donate their slots.
  last_B, budget_B, row_B = (jnp.zeros((batch,), jnp.int32) for _ in range(3))
  repeat = config.key_repeats(tensor)
  cache = transformer.init_cache(config, batch, length, dtype, repeat)
  return Slots(cache, last_B, jnp.ones_like(last_B), budget_B, row_B)


def slot_shardings(
  mesh: jax.sharding.Mesh, config: architecture.Config
) -> Slots:
  """Where slots live: rows over data and fsdp, heads over tensor.

  Args:
    mesh: Of the run.
    config: Of the model; if `tensor` does not divide its query heads, the cache
      is whole on each device of that axis.

  Returns:
    A sharding for each array.
  """
  is_split = config.num_heads % mesh.shape['tensor'] == 0
  heads_axis = 'tensor' if is_split else None
  cache = NamedSharding(mesh, P(*meshes.ROWS, None, None, heads_axis))
  row = meshes.rows(mesh)
  return Slots(transformer.Cache(cache, cache), row, row, row, row)


@functools.cache
def _empty_on(
  mesh: jax.sharding.Mesh, config: architecture.Config
) -> Callable[..., Slots]:
  """`empty`, compiled, its result sharded; one for each mesh and model."""
  where = slot_shardings(mesh, config)
  made = functools.partial(empty, config, tensor=mesh.shape['tensor'])
  return jax.jit(made, static_argnums=(0, 1, 2), out_shardings=where)


def empty_on(
  mesh: jax.sharding.Mesh,
  config: architecture.Config,
  batch: int,
  length: int,
  dtype,
) -> Slots:
  """`empty`, made where `slot_shardings` says."""
  return _empty_on(mesh, config)(batch, length, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames=('graphdef', 'config', 'dtype'))
def prefill_prompts(
  graphdef, params, tokens_PT, length_P, *, config: architecture.Config, dtype
) -> Slots:
  """Reads the opening of every group.

  Args:
    graphdef: Of the model.
    params: Of the model.
    tokens_PT: Right-padded ids.
    length_P: True lengths.
    config: Of the model.
    dtype: Of the cache.

  Returns:
    One slot a group, as long as the padded prompt.
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
  """Starts episodes in the slots whose `group_B` is not -1.

  Args:
    slots: All slots.
    prompts: From `prefill_prompts`.
    group_B: Which prompt of its shard a slot takes; -1 leaves the slot as it
      is.
    row_B: The episode's row, read where a slot starts.
    budget_B: Ids it may sample in its first turn, read where a slot starts.

  Returns:
    The slots.
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
  """Appends observations to some slots.

  Args:
    graphdef: Of the model.
    params: Of the model.
    slots: All slots.
    tokens_MT: The new ids, right-padded.
    count_M: How many there are, at least 1 for a slot that takes part.
    slot_M: Which slot of its shard each row is for; padding rows name one past
      the end.
    budget_M: Ids that may be sampled in the next turn.
    view: Static. At least the length of every slot after this call.

  Returns:
    The slots.
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

  last_M = _pick(tokens_MT, count_M - 1)
  return _of_shard(put)(
    slot_M, slots, part, last_M, length_M + count_M, budget_M
  )


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
  """Samples up to `steps` ids in every slot that has budget.

  The random number of an id depends on `key`, the episode's row and the
  position of the id, and on nothing else: not on the slot, nor on what its
  neighbours do.

  Args:
    graphdef: Of the model.
    params: Of the model.
    slots: All slots.
    key: PRNG key of this iteration.
    temperature: Divides the logits; > 0.
    steps: Static. Most ids sampled per slot.
    view: Static. At least the length of every live slot after this call.
    stop_ids: Static tuple. Sampling one of these ends a turn.
    ends_early: Static. Whether to look after each step if any slot of any
      device has budget left. Over a slow network that costs more than the few
      steps it saves; what is emitted is the same.

  Returns:
    The slots, and what was emitted. Log-probs are at `temperature`.
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
  return slots, meshes.constrain_replicated(out)


@jax.jit
def compact(slots: Slots, keep_M) -> Slots:
  """Keeps the slots with the indices `keep_M` in their shard, in that order."""
  return _of_shard(lambda keep_M, slots: _rows(slots, keep_M))(keep_M, slots)


def _of_shard(move: Callable[..., Any]) -> Callable[..., Any]:
  """Lets every row shard of the ambient mesh move its own rows alone.

  Indices mean rows of the shard then, and heads stay spread over `tensor`.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return move
  return jax.shard_map(
    move,
    in_specs=meshes.ROWS,
    out_specs=meshes.ROWS,
    axis_names={'data', 'fsdp'},
  )


def _rows(tree: Any, index_M: jax.Array) -> Any:
  """The rows with these indices; one past the end stands for the last."""
  return jax.tree.map(lambda x: jnp.take(x, index_M, axis=0, mode='clip'), tree)


def _sample(key, row_B, position_B, logits_BV):
  """One id per row and its log-prob, from a stream named by row, position."""

  def one(row, position, logits_V):
    name = jax.random.fold_in(jax.random.fold_in(key, row), position)
    return jax.random.categorical(name, logits_V)

  token_B = jax.vmap(one)(row_B, position_B, logits_BV).astype(jnp.int32)
  logprob_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32))
  return token_B, _pick(logprob_BV, token_B)


def _pick(x_BN, index_B):
  return jnp.take_along_axis(x_BN, index_B[:, None], axis=1)[:, 0]
