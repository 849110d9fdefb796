"""The device programs of one iteration, with abstract arguments.

Nothing is allocated: every argument is a shape, a dtype and a sharding on
devices that need not exist. The functions are those that training calls.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from actfocus_jax import build
from actfocus_jax.config import schema
from actfocus_jax.model import architecture
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.rollout import collector, episode, placement, sampling

_ALWAYS = ('actor', 'critic', 'optimizers', 'reference')
# Any ids; the program depends on their number only.
_STOP_IDS = (0, 1)


# --- Episodes ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Workload:
  """Tokens of one episode, as the estimate assumes them.

  All slots are equally long, and the ends of their turns are spread evenly, so
  that a padded prefill of a quarter of the slots follows every call to decode.
  That is the expensive side: fewer prefills follow turns that end together.

  Attributes:
    prompt_tokens: tokens of the opening.
    observation_tokens: tokens of each later observation.
    response_tokens: tokens sampled in a turn.
    turns: turns of an episode.
    context: most tokens of an episode; what lies beyond is not played.
    steps: ids sampled in one call to decode.
    is_most: True if the episode is the longest that the config allows; batches
      are then padded to the longest length.
  """

  prompt_tokens: int
  observation_tokens: int
  response_tokens: int
  turns: int
  context: int
  steps: int
  is_most: bool = True

  @property
  def length(self) -> int:
    """Tokens of a whole episode."""
    more = self.turns * self.response_tokens
    more += (self.turns - 1) * self.observation_tokens
    return min(self.context, self.prompt_tokens + more)

  @property
  def sampled(self) -> int:
    """Tokens that the policy samples in an episode."""
    return sum(sampled for _, sampled in self._turns())

  def _turns(self) -> list[tuple[int, int]]:
    """(tokens before the turn, tokens sampled in it), until the context."""
    turns, start = [], self.prompt_tokens
    for _ in range(self.turns):
      sampled = min(self.response_tokens, self.context - start)
      if sampled <= 0:
        break
      turns.append((start, sampled))
      start += sampled + self.observation_tokens
    return turns

  def decoding(self) -> dict[int, float]:
    """Return the number of calls to decode for each slot length."""
    calls: dict[int, float] = {}
    for start, sampled in self._turns():
      for done in range(0, sampled, self.steps):
        reached = start + min(done + self.steps, sampled)
        calls[reached] = calls.get(reached, 0.0) + 1
    return calls

  def turn_ends(self) -> dict[int, float]:
    """Return the number of observation prefills for each slot length."""
    turns = self._turns()
    calls: dict[int, float] = {}
    for (_, sampled), (start, _) in zip(turns, turns[1:], strict=False):
      # Each prefill takes a quarter of the slots.
      ends = max(-(-sampled // self.steps), 4)
      calls[start] = calls.get(start, 0.0) + ends
    return calls


# --- Arrays and programs -----------------------------------------------------


class Seats(NamedTuple):
  """Abstract arrays of a rollout: slots with the cache, and of the openings."""

  slots: sampling.Slots
  prompts: sampling.Slots

  @property
  def batch(self) -> int:
    """Number of slots that decode together."""
    return self.slots.last_B.shape[0]

  @property
  def prompt_rows(self) -> int:
    """Rows of the prefill of the openings."""
    return self.prompts.last_B.shape[0]


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled function of a run.

  Attributes:
    name: name with the static size, for example 'decode, view 1024'.
    phase: 'rollout', 'score' or 'update'.
    trace: function that returns the traced program.
    calls: calls in one iteration; 0 for a program compiled for its memory only.
    beside: parts that stay in memory while it runs and are not arguments.
    moved: bytes that a chip reads and writes in a call at least: weights, cache
      and batch, without activations.
    trips: runs of a loop whose length only the data decide.
  """

  name: str
  phase: str
  trace: Callable[[], Any]
  calls: float
  beside: tuple[str, ...]
  moved: float
  trips: float = 1.0


class Run:
  """The programs of one config on one mesh."""

  def __init__(
    self,
    c: ml_collections.ConfigDict,
    config: architecture.Config,
    mesh_sizes: dict[str, int],
    devices: list[Any] | None,
    work: Workload,
  ):
    """Make the abstract arrays.

    Args:
      c: a checked config whose batches the mesh can share.
      config: architecture of the model.
      mesh_sizes: sizes of the mesh, as `make_mesh` takes them.
      devices: devices, which need not exist; None for those that do.
      work: tokens of an episode.

    Raises:
      ValueError: if a parameter cannot be split over the mesh.
    """
    self.c, self.config, self.work = c, config, work
    self.mesh = mesh_lib.make_mesh(**mesh_sizes, devices=devices)
    self.model = build.model(c, pathlib.Path(), self.mesh, config)
    learners = build.learners(c, self.model)
    self.step = build.train_step(c, learners)
    self.shards = mesh_lib.row_shards(self.mesh)
    self.rows = mesh_lib.rows(self.mesh)
    self.replicated = mesh_lib.replicated(self.mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    self.key = _place(key, self.replicated)
    self.lengths = tuple(c.rollout.lengths) or (c.limits.context,)
    self.episodes = c.rollout.prompts * c.rollout.members
    self.prompt_width = collector.double_up(
      work.prompt_tokens, c.rollout.observation_block
    )
    self.state = learners.abstract()
    frozen = _recast(self.state.actor.params, self.model.dtype)
    self.reference = frozen if schema.has_reference(c) else None
    shardings = mesh_lib.decode_shardings(frozen, self.mesh)
    self.decoding = jax.tree.map(_place, frozen, shardings)
    self.training = self._seats(c.rollout.prompts, c.rollout.members)
    self.evaluation = self._seats(c.eval.prompts, c.eval.members)
    both = (self.training, self.evaluation)
    self.most_slots = max(both, key=lambda seats: seats.batch)
    self.most_prompts = max(both, key=lambda seats: seats.prompt_rows)

  def parts(self) -> dict[str, Any]:
    """Return the abstract arrays that outlive a program, by part."""
    actor, critic = self.state.actor, self.state.critic
    return {
      'actor': actor.params,
      'critic': critic and critic.params,
      'optimizers': [actor.opt_state, critic and critic.opt_state],
      'reference': self.reference,
      'decoding copy': self.decoding,
      'cache': self.most_slots.slots,
      'prompt cache': self.most_prompts.prompts,
      'batch': self._trajectories(self.lengths[-1]),
    }

  def programs(self) -> Iterator[Program]:
    """Yield all programs, in the order of an iteration."""
    yield from self._rollout()
    usual = self.lengths[-1]
    if not self.work.is_most:
      usual = next(n for n in self.lengths if n >= self.work.length)
    for length in dict.fromkeys((usual, self.lengths[-1])):
      yield from self._learning(length, float(length == usual))

  # --- Rollout ---------------------------------------------------------------

  def _rollout(self) -> Iterator[Program]:
    training, evaluation = self.training, self.evaluation
    waves = -(-self.episodes // training.batch)
    # The actor is what is copied.
    moved = per_chip((self.state.actor.params, self.decoding))
    copy = self._copy
    yield Program('decoding copy', 'rollout', copy, 1, _ALWAYS[1:], moved)
    yield self._prefill_prompts(training, 1)
    yield self._admit(training, waves)
    prefills = self._views(self.work.turn_ends())
    for view, calls in prefills.items():
      yield self._prefill(training, view, calls * waves)
    decodes = self._views(self.work.decoding())
    for view, calls in decodes.items():
      yield self._decode(training, view, calls * waves)
    # An iteration may not call the others, but they may need the most memory.
    quarter = self._quarter(self.most_slots.batch)
    if self.most_slots.batch >= max(collector.LEAST_TO_COMPACT, quarter + 1):
      yield self._compact(self.most_slots)
    has_slots = self.most_slots is evaluation
    has_prompts = self.most_prompts is evaluation
    if has_slots:
      for view in sorted(prefills)[-1:]:
        yield self._prefill(evaluation, view, 0)
      yield self._decode(evaluation, max(decodes), 0)
    if has_prompts:
      yield self._prefill_prompts(evaluation, 0)
    if has_slots or has_prompts:
      yield self._admit(evaluation, 0)

  def _copy(self):
    leaves = tuple(jax.tree.leaves(self.state.actor.params))
    layout = tuple(x.sharding for x in jax.tree.leaves(self.decoding))
    return mesh_lib.recast(self.model.dtype, layout).trace(leaves)

  def _prefill_prompts(self, seats: Seats, calls: float) -> Program:
    def trace():
      return sampling.prefill_prompts.trace(
        *(self.model.graphdef, self.decoding),
        *self._ints((seats.prompt_rows, self.prompt_width), ()),
        config=self.config,
        dtype=self.model.dtype,
      )

    name = f'prefill of prompts{self._when(seats)}'
    moved = per_chip((self.decoding, seats.prompts))
    return Program(name, 'rollout', trace, calls, _ALWAYS, moved)

  def _admit(self, seats: Seats, calls: float) -> Program:
    def trace():
      ints = self._ints((seats.batch,), (), ())
      return sampling.admit.trace(seats.slots, seats.prompts, *ints)

    beside = (*_ALWAYS, 'decoding copy')
    name, moved = f'admit{self._when(seats)}', per_chip(seats.prompts)
    return Program(name, 'rollout', trace, calls, beside, moved)

  def _prefill(self, seats: Seats, view: int, calls: float) -> Program:
    block = self.c.rollout.observation_block
    width = collector.double_up(self.work.observation_tokens, block)
    sizes = (self._quarter(seats.batch), width)

    def trace():
      tokens_MT, count_M, slot_M, budget_M = self._ints(sizes, (), (), ())
      return sampling.prefill.trace(
        *(self.model.graphdef, self.decoding, seats.slots),
        *(tokens_MT, count_M, slot_M, budget_M),
        view=view,
      )

    name = f'prefill{self._when(seats)}, view {view}'
    beside = (*_ALWAYS, 'prompt cache')
    moved = per_chip(self.decoding)
    moved += self._viewed(seats, view) * sizes[0] / seats.batch
    return Program(name, 'rollout', trace, calls, beside, moved)

  def _decode(self, seats: Seats, view: int, calls: float) -> Program:
    steps = self.c.rollout.decode_steps
    temperature = jax.ShapeDtypeStruct((), jnp.float32)

    def trace():
      return sampling.decode.trace(
        *(self.model.graphdef, self.decoding, seats.slots),
        *(self.key, _place(temperature, self.replicated)),
        steps=steps,
        view=view,
        stop_ids=_STOP_IDS,
        ends_early=mesh_lib.slice_count(self.mesh) == 1,
      )

    name = f'decode{self._when(seats)}, view {view}'
    beside = (*_ALWAYS, 'prompt cache')
    moved = steps * (per_chip(self.decoding) + self._viewed(seats, view))
    return Program(name, 'rollout', trace, calls, beside, moved, steps)

  def _compact(self, seats: Seats) -> Program:
    keep = (self._quarter(seats.batch),)

    def trace():
      return sampling.compact.trace(seats.slots, *self._ints(keep))

    beside = (*_ALWAYS, 'decoding copy', 'prompt cache')
    moved = 2 * per_chip(seats.slots) * keep[0] / seats.batch
    return Program('compact', 'rollout', trace, 0, beside, moved)

  # --- Learning --------------------------------------------------------------

  def _learning(self, length: int, calls: float) -> Iterator[Program]:
    state, reference = self.state, self.reference
    batch = self._trajectories(length)
    # The data decide how many chunks of tokens are scored.
    rows = (self.c.learner.microbatch or self.c.learner.minibatch) / self.shards
    sampled = min(1.0, self.work.sampled / length) * rows * length
    chunks = math.ceil(sampled / self.c.learner.score_chunk)

    def score():
      return self.step.prepare.trace(state, reference, batch, self.key)

    def update():
      ready, metrics = jax.eval_shape(
        self.step.prepare, state, reference, batch, self.key
      )
      ready = jax.tree.map(lambda x: _place(x, self.rows), ready)
      metrics = jax.tree.map(lambda x: _place(x, self.replicated), metrics)
      return self.step.finish.trace(state, ready, metrics, self.key)

    name, trained = f'score, length {length}', (state.actor, state.critic)
    models = state.actor.params, state.critic and state.critic.params
    moved = per_chip((models, reference, batch))
    yield Program(name, 'score', score, calls, ('optimizers',), moved, chunks)
    name, beside = f'update, length {length}', ('reference', 'batch')
    moved = 2 * per_chip(trained) + per_chip(batch)
    yield Program(name, 'update', update, calls, beside, moved)

  # --- Sizes and arguments, as the rollout chooses them ----------------------

  def _viewed(self, seats: Seats, view: int) -> float:
    """Bytes of the positions of the cache that a program reads."""
    return per_chip(seats.slots) * view / seats.slots.cache.k_BLSN.shape[2]

  def _quarter(self, batch: int) -> int:
    """Rows of a small prefill, and slots that a batch shrinks to."""
    return collector.round_up(max(batch // 4, 1), self.shards)

  def _when(self, seats: Seats) -> str:
    return '' if seats is self.training else ' in evaluation'

  def _views(self, lengths: dict[int, float]) -> dict[int, float]:
    """Return the number of calls for each view of the cache."""
    most = self.training.slots.cache.k_BLSN.shape[2]
    block = self.c.rollout.cache_block
    views: dict[int, float] = {}
    for length, calls in lengths.items():
      view = min(collector.double_up(length, block), most)
      views[view] = views.get(view, 0.0) + calls
    return views

  def _seats(self, prompts: int, members: int) -> Seats:
    episodes = prompts * members
    slots = min(self.c.rollout.slots or episodes, episodes)
    batch = collector.round_up(slots, self.shards)
    length = collector.round_up(
      self.c.limits.context, self.c.rollout.cache_block
    )
    # Each shard reads the openings that its episodes need.
    groups = [p for p in range(prompts) for _ in range(members)]
    read = len(placement.ShardPlacement.of(groups, range(self.shards)).groups)
    shardings = sampling.slot_shardings(self.mesh, self.config)

    def slots(batch: int, length: int) -> sampling.Slots:
      sizes = batch, length, self.model.dtype, self.mesh.shape['tensor']
      empty = jax.eval_shape(lambda: sampling.empty(self.config, *sizes))
      return jax.tree.map(_place, empty, shardings)

    return Seats(slots(batch, length), slots(read, self.prompt_width))

  def _trajectories(self, length: int):
    """Abstract episodes with the fields that the rollout writes."""
    none = episode.to_trajectory([], [], length=length, pad=0)

    def rows(x):
      shape = (self.episodes, *x.shape[1:])
      return jax.ShapeDtypeStruct(shape, x.dtype, sharding=self.rows)

    return jax.tree.map(rows, none)

  def _ints(self, first: tuple[int, ...], *more: tuple[int, ...]):
    return [
      jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.rows)
      for shape in (first, *((first[0], *shape) for shape in more))
    ]


def per_chip(tree: Any) -> float:
  """Bytes of abstract arrays on one chip, without padding to tiles."""
  total = 0.0
  for x in jax.tree.leaves(tree):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    size = 8 if is_key else x.dtype.itemsize
    total += math.prod(x.sharding.shard_shape(x.shape)) * size
  return total


def _place(x, sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _recast(shapes: Any, dtype: Any) -> Any:
  """The same arrays in another dtype, with the same shardings."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), shapes
  )
