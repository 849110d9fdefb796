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
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from actfocus_jax.model import architecture, transformer


@flax.struct.dataclass
class Slots:
  """Rows that decode together.

  Attributes:
    cache: Keys and values, [L, B, S, J, C].
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
  """What `decode` sampled: `[steps, B]`, `live` marks what counts."""

  token_NB: jax.Array
  logprob_NB: jax.Array
  live_NB: jax.Array


def empty(config: architecture.Config, batch: int, length: int, dtype) -> Slots:
  """Slots without an episode."""
  # Buffers of their own: most calls donate their slots.
  last_B, budget_B, row_B = (jnp.zeros((batch,), jnp.int32) for _ in range(3))
  cache = transformer.init_cache(config, batch, length, dtype)
  return Slots(cache, last_B, jnp.ones_like(last_B), budget_B, row_B)


def place(slots: Slots, mesh: jax.sharding.Mesh) -> Slots:
  """Moves slots to where `slot_shardings` says."""
  return jax.device_put(slots, slot_shardings(slots, mesh))


def slot_shardings(slots: Slots, mesh: jax.sharding.Mesh) -> Slots:
  """Shards slots over the mesh's data and fsdp axes, key heads over tensor."""
  rows = ('data', 'fsdp')
  tensor = mesh.shape['tensor']
  heads = slots.cache.k_LBSJC.shape[3]
  head_axis = 'tensor' if heads % tensor == 0 else None
  cache = NamedSharding(mesh, P(None, rows, None, head_axis, None))
  row = NamedSharding(mesh, P(rows))
  return Slots(
    transformer.Cache(cache, cache),
    last_B=row,
    length_B=row,
    budget_B=row,
    row_B=row,
  )


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
  slots = empty(config, count, T, dtype)
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
    group_B: Which prompt a slot takes; -1 leaves the slot as it is.
    row_B: The episode's row, read where a slot starts.
    budget_B: Ids it may sample in its first turn, read where a slot starts.

  Returns:
    The slots.
  """
  new_B = group_B >= 0
  source_B = jnp.maximum(group_B, 0)
  width = min(prompts.cache.k_LBSJC.shape[2], slots.cache.k_LBSJC.shape[2])

  def copy(old_LBSJC, prompt_LPSJC):
    taken = prompt_LPSJC[:, source_B, :width]
    mask = new_B[None, :, None, None, None]
    head = jnp.where(mask, taken, old_LBSJC[:, :, :width])
    return old_LBSJC.at[:, :, :width].set(head)

  return Slots(
    cache=jax.tree.map(copy, slots.cache, prompts.cache),
    last_B=jnp.where(new_B, prompts.last_B[source_B], slots.last_B),
    length_B=jnp.where(new_B, prompts.length_B[source_B], slots.length_B),
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
    slot_M: Which slot each row is for; padding rows name a slot past the end.
    budget_M: Ids that may be sampled in the next turn.
    view: Static. At least the length of every slot after this call.

  Returns:
    The slots.
  """
  model = nnx.merge(graphdef, params)
  last_M, length_M = slots.last_B[slot_M], slots.length_B[slot_M]
  fed_MT = jnp.concatenate([last_M[:, None], tokens_MT[:, :-1]], axis=1)
  part = jax.tree.map(lambda x: x[:, slot_M, :view], slots.cache)
  _, part = model.extend(fed_MT, length_M - 1, part, view=view)
  cache = jax.tree.map(
    lambda whole, new: whole.at[:, slot_M, :view].set(new, mode='drop'),
    slots.cache,
    part,
  )

  def put(whole_B, new_M):
    return whole_B.at[slot_M].set(new_M, mode='drop')

  return slots.replace(
    cache=cache,
    last_B=put(slots.last_B, _pick(tokens_MT, count_M - 1)),
    length_B=put(slots.length_B, length_M + count_M),
    budget_B=put(slots.budget_B, budget_M),
  )


@functools.partial(
  jax.jit,
  static_argnames=('graphdef', 'steps', 'view', 'stop_ids'),
  donate_argnames='slots',
)
def decode(
  graphdef, params, slots: Slots, key, temperature, *, steps, view, stop_ids
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
    return (i < steps) & (slots.budget_B > 0).any()

  out = Emitted(
    jnp.zeros((steps, B), jnp.int32),
    jnp.zeros((steps, B), jnp.float32),
    jnp.zeros((steps, B), bool),
  )
  _, slots, out = jax.lax.while_loop(unfinished, step, (0, slots, out))
  return slots, out


@jax.jit
def compact(slots: Slots, keep_M) -> Slots:
  """Keeps the slots with the indices `keep_M`, in that order."""
  return Slots(
    cache=jax.tree.map(lambda x: x[:, keep_M], slots.cache),
    last_B=slots.last_B[keep_M],
    length_B=slots.length_B[keep_M],
    budget_B=slots.budget_B[keep_M],
    row_B=slots.row_B[keep_M],
  )


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
