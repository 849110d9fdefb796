"""The device programs of one iteration, with abstract arguments.

Nothing is allocated: every argument is a shape, a dtype and a sharding on
devices that need not exist. The functions are those that training calls, so
that what is compiled here is what would run there.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from actfocus_jax import build, recipe
from actfocus_jax.aot import parts, workload
from actfocus_jax.config import schema
from actfocus_jax.model import architecture
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.rollout import collector, episode, placement, sampling

ALWAYS = ('actor', 'critic', 'optimizers', 'reference')
# The actor is what is copied.
_BESIDE_COPY = ('critic', 'optimizers', 'reference')
# Any ids; how many there are is all that the program depends on.
_STOP_IDS = (0, 1)


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled function of a run.

  Attributes:
    name: Of the phase, with its static size where it has several.
    phase: 'rollout', 'score' or 'update'.
    trace: Makes the traced function, of which jaxpr and lowering follow.
    calls: In one iteration, of the workload.
    beside: Parts that stay in memory while it runs and are no arguments.
    trips: Of loops whose length only the data decide.
    is_timed: False for what is compiled for its memory alone.
  """

  name: str
  phase: str
  trace: Callable[[], Any]
  calls: float
  beside: tuple[str, ...] = ()
  trips: float = 1.0
  is_timed: bool = True


class Run:
  """The programs of one config on one mesh."""

  def __init__(
    self,
    c: ml_collections.ConfigDict,
    config: architecture.Config,
    mesh: jax.sharding.Mesh,
    work: workload.Workload,
    *,
    with_fused: bool = False,
  ):
    """Shapes only; takes a second.

    Args:
      c: A checked config whose batches the mesh can share.
      config: Of the model.
      mesh: Of devices that need not exist.
      work: How long episodes are.
      with_fused: Whether score and update are compiled as one program, too,
        which takes longer than both.

    Raises:
      ValueError: If a parameter cannot be split over the mesh.
    """
    self.c, self.config, self.mesh, self.work = c, config, mesh, work
    self.with_fused = with_fused
    self.model = build.shaped(c, pathlib.Path(), config, mesh)
    self.who = recipe.learners(c, self.model)
    self.step = recipe.train_step(c, self.who)
    self.shards = mesh_lib.row_shards(mesh)
    self.rows = mesh_lib.rows(mesh)
    everywhere = mesh_lib.replicated(mesh)
    self.key = jax.ShapeDtypeStruct(
      (), jax.random.key(0).dtype, sharding=everywhere
    )
    self.temperature = jax.ShapeDtypeStruct(
      (), jnp.float32, sharding=everywhere
    )
    self.parts = self._parts()

  def _parts(self) -> parts.Parts:
    state = self.who.abstract()
    reference = None
    if schema.has_reference(self.c):
      reference = _recast(state.actor.params, self.model.dtype)
    where = mesh_lib.decode_shardings(state.actor.params, self.mesh)
    decoding = _placed(_recast(state.actor.params, self.model.dtype), where)
    return parts.Parts(
      state=state,
      reference=reference,
      decoding=decoding,
      training=self._seats(self.c.rollout.prompts, self.c.rollout.members),
      evaluation=self._seats(self.c.eval.prompts, self.c.eval.members),
      batch=self._trajectories(self.lengths[-1]),
    )

  # --- Sizes, as agent.rollout chooses them ----------------------------------

  @property
  def episodes(self) -> int:
    """Of one iteration."""
    return self.c.rollout.prompts * self.c.rollout.members

  def quarter(self, batch: int) -> int:
    """Rows of a small prefill, and slots that a batch shrinks to."""
    return collector.round_up(max(batch // 4, 1), self.shards)

  @property
  def prompt_width(self) -> int:
    """Padded tokens of an opening."""
    block = self.c.rollout.observation_block
    return collector.double_up(self.work.prompt_tokens, block)

  @property
  def lengths(self) -> tuple[int, ...]:
    """To which batches are padded."""
    return tuple(self.c.rollout.lengths) or (self.c.limits.context,)

  @property
  def usual_length(self) -> int:
    """The padded length of the workload's episodes."""
    if self.work.is_most:
      return self.lengths[-1]
    return next(n for n in self.lengths if n >= self.work.length)

  # --- The programs ----------------------------------------------------------

  def programs(self) -> Iterator[Program]:
    """All of them, in the order of an iteration."""
    yield from self._rollout()
    for length in dict.fromkeys((self.usual_length, self.lengths[-1])):
      yield from self._learning(length)

  def _rollout(self) -> Iterator[Program]:
    training = self.parts.training
    waves = -(-self.episodes // training.batch)
    yield Program('decoding copy', 'rollout', self._copy, 1, _BESIDE_COPY)
    yield self._read(training)
    yield self._admit(training, waves)
    for view, calls in self._views(self.work.turn_ends()).items():
      name = f'prefill, view {view}'
      yield self._prefill(name, training, view, calls * waves)
    for view, calls in self._views(self.work.decoding()).items():
      name = f'decode, view {view}'
      yield self._decode(name, training, view, calls * waves)
    yield from self._rarely()

  def _rarely(self) -> Iterator[Program]:
    """What not every iteration calls, and may need the most memory.

    Few episodes may be left, and an evaluation may have more slots or prompts
    than training.
    """
    training, seats = self.parts.training, self.parts.seats
    least = max(collector.LEAST_TO_COMPACT, self.quarter(seats.batch) + 1)
    if seats.batch >= least:
      yield self._compact(seats)
    if seats is not training:
      for view in sorted(self._views(self.work.turn_ends()))[-1:]:
        yield self._prefill(f'prefill in evaluation, view {view}', seats, view)
      view = max(self._views(self.work.decoding()))
      yield self._decode(f'decode in evaluation, view {view}', seats, view)
    if self.parts.readers is not training:
      yield self._read(self.parts.evaluation, ' in evaluation')
    if any(self.parts.evaluation is one for one in (seats, self.parts.readers)):
      yield self._admit(self.parts.evaluation, 0, ' in evaluation')

  def _read(self, seats: parts.Seats, when: str = '') -> Program:
    return Program(
      f'prefill of prompts{when}',
      'rollout',
      lambda: sampling.prefill_prompts.trace(
        self.model.graphdef,
        self.parts.decoding,
        *self._ints((seats.prompt_rows, self.prompt_width), ()),
        config=self.config,
        dtype=self.model.dtype,
      ),
      float(not when),
      ALWAYS,
      is_timed=not when,
    )

  def _admit(self, seats: parts.Seats, calls: float, when: str = '') -> Program:
    return Program(
      f'admit{when}',
      'rollout',
      lambda: sampling.admit.trace(
        seats.slots, seats.prompts, *self._ints((seats.batch,), (), ())
      ),
      calls,
      (*ALWAYS, 'decoding copy'),
      is_timed=not when,
    )

  def _compact(self, seats: parts.Seats) -> Program:
    keep = (self.quarter(seats.batch),)
    return Program(
      'compact',
      'rollout',
      lambda: sampling.compact.trace(seats.slots, *self._ints(keep)),
      0,
      (*ALWAYS, 'decoding copy', 'prompt cache'),
      is_timed=False,
    )

  def _prefill(
    self, name: str, seats: parts.Seats, view: int, calls: float = 0
  ) -> Program:
    block = self.c.rollout.observation_block
    width = collector.double_up(self.work.observation_tokens, block)
    sizes = (self.quarter(seats.batch), width)

    def trace():
      tokens_MT, count_M, slot_M, budget_M = self._ints(sizes, (), (), ())
      return sampling.prefill.trace(
        self.model.graphdef,
        self.parts.decoding,
        seats.slots,
        *(tokens_MT, count_M, slot_M, budget_M),
        view=view,
      )

    beside = (*ALWAYS, 'prompt cache')
    timed = bool(calls)
    return Program(name, 'rollout', trace, calls, beside, is_timed=timed)

  def _decode(
    self, name: str, seats: parts.Seats, view: int, calls: float = 0
  ) -> Program:
    steps = self.c.rollout.decode_steps

    def trace():
      return sampling.decode.trace(
        self.model.graphdef,
        self.parts.decoding,
        seats.slots,
        self.key,
        self.temperature,
        steps=steps,
        view=view,
        stop_ids=_STOP_IDS,
        ends_early=mesh_lib.slice_count(self.mesh) == 1,
      )

    return Program(
      name,
      'rollout',
      trace,
      calls,
      (*ALWAYS, 'prompt cache'),
      trips=steps,
      is_timed=bool(calls),
    )

  def _learning(self, length: int) -> Iterator[Program]:
    batch = self._trajectories(length)
    # What only the data decide: tokens that are scored, as pieces of them. The
    # reference may be asked for fewer.
    marked = self.work.sampled_share(length)
    rows = self.step_microbatch // self.shards
    pieces = math.ceil(marked * rows * length / self.c.learner.score_chunk)
    is_usual = length == self.usual_length
    state, reference = self.parts.state, self.parts.reference
    yield Program(
      f'score, length {length}',
      'score',
      lambda: self.step.prepare.trace(state, reference, batch, self.key),
      float(is_usual),
      ('optimizers',),
      pieces,
      is_usual,
    )
    yield Program(
      f'update, length {length}',
      'update',
      lambda: self._update(length),
      float(is_usual),
      ('reference', 'batch'),
      is_timed=is_usual,
    )
    if self.with_fused and length == self.lengths[-1]:
      yield Program(
        f'score and update in one, length {length}',
        'update',
        lambda: self.step.fused.trace(state, reference, batch, self.key),
        0.0,
        (),
        pieces,
        is_timed=False,
      )

  @property
  def step_microbatch(self) -> int:
    """Rows of a forward and backward pass."""
    return self.c.learner.microbatch or self.c.learner.minibatch

  def _update(self, length: int):
    """The second half of the step, on what the first one leaves."""
    batch, state = self._trajectories(length), self.parts.state
    ready, metrics = jax.eval_shape(
      self.step.prepare, state, self.parts.reference, batch, self.key
    )
    everywhere = mesh_lib.replicated(self.mesh)
    ready = jax.tree.map(lambda x: _place(x, self.rows), ready)
    metrics = jax.tree.map(lambda x: _place(x, everywhere), metrics)
    return self.step.finish.trace(state, ready, metrics, self.key)

  def _copy(self):
    leaves = tuple(jax.tree.leaves(self.parts.state.actor.params))
    layout = tuple(x.sharding for x in jax.tree.leaves(self.parts.decoding))
    return mesh_lib.recast(self.model.dtype, layout).trace(leaves)

  # --- Arguments -------------------------------------------------------------

  def _views(self, lengths: dict[int, float]) -> dict[int, float]:
    """Calls by the cache view that the longest slot asks for."""
    most = self.parts.training.slots.cache.k_BLSN.shape[2]
    block = self.c.rollout.cache_block
    views: dict[int, float] = {}
    for length, calls in lengths.items():
      view = min(collector.double_up(length, block), most)
      views[view] = views.get(view, 0.0) + calls
    return views

  def _seats(self, prompts: int, members: int) -> parts.Seats:
    episodes = prompts * members
    slots = min(self.c.rollout.slots or episodes, episodes)
    batch = collector.round_up(slots, self.shards)
    length = collector.round_up(
      self.c.limits.context, self.c.rollout.cache_block
    )
    # Of the openings each shard reads those that its episodes need.
    groups = [p for p in range(prompts) for _ in range(members)]
    read = len(placement.ShardPlacement.of(groups, range(self.shards)).groups)
    return parts.Seats(
      self._slots(batch, length), self._slots(read, self.prompt_width)
    )

  def _slots(self, batch: int, length: int) -> sampling.Slots:
    shapes = jax.eval_shape(
      lambda: sampling.empty(
        self.config,
        batch,
        length,
        self.model.dtype,
        self.mesh.shape['tensor'],
      )
    )
    where = sampling.slot_shardings(self.mesh, self.config)
    return _placed(shapes, where)

  def _trajectories(self, length: int):
    """Abstract episodes; their fields are those that the rollout writes."""
    none = episode.to_trajectory([], [], length=length, pad=0)

    def rows(x):
      return jax.ShapeDtypeStruct(
        (self.episodes, *x.shape[1:]), x.dtype, sharding=self.rows
      )

    return jax.tree.map(rows, none)

  def _ints(self, first: tuple[int, ...], *more: tuple[int, ...]):
    shapes = [first, *((first[0], *shape) for shape in more)]
    return [
      jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.rows)
      for shape in shapes
    ]


def _place(x, sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _placed(shapes: Any, where: Any) -> Any:
  return jax.tree.map(_place, shapes, where)


def _recast(shapes: Any, dtype: Any) -> Any:
  """The same arrays in another dtype, where they are."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), shapes
  )
