"""The device programs of one iteration, with abstract arguments.

Nothing is allocated: every argument is a shape, a dtype and a sharding on
devices that need not exist. The functions are those that training calls, so
that what is compiled here is what would run there.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from actfocus_jax import assemble, recipe
from actfocus_jax.agent import episode, homes, rollout, sampling
from actfocus_jax.aot import workload
from actfocus_jax.model import architecture
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.run import settings

STATE = ('actor', 'critic', 'optimizers')
ALWAYS = (*STATE, 'reference')
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


@dataclasses.dataclass(frozen=True)
class Parts:
  """Abstract arrays that outlive a program, with their shardings.

  Attributes:
    state: Of training.
    reference: The frozen copy; None without one.
    decoding: The copy that decodes.
    slots: Of the rollout, with the cache.
    prompts: The slots of the groups' openings.
    batch: Of all episodes, at the longest length.
  """

  state: Any
  reference: Any
  decoding: Any
  slots: sampling.Slots
  prompts: sampling.Slots
  batch: Any

  def named(self) -> dict[str, Any]:
    """Part -> its arrays, as memory tables name them."""
    critic = self.state.critic
    optimizers = [self.state.actor.opt_state]
    optimizers += [critic.opt_state] if critic else []
    return {
      'actor': self.state.actor.params,
      'critic': critic.params if critic else None,
      'optimizers': optimizers,
      'reference': self.reference,
      'decoding copy': self.decoding,
      'cache': self.slots,
      'prompt cache': self.prompts,
      'batch': self.batch,
    }


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
    self.model = assemble.shaped(c, pathlib.Path(), config, mesh)
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

  def _parts(self) -> Parts:
    state = self.who.abstract()
    reference = None
    if settings.has_reference(self.c):
      reference = _recast(state.actor.params, self.model.dtype)
    where = mesh_lib.decode_shardings(state.actor.params, self.mesh)
    decoding = _placed(_recast(state.actor.params, self.model.dtype), where)
    length = rollout.round_up(self.c.limits.context, self.c.rollout.cache_block)
    return Parts(
      state=state,
      reference=reference,
      decoding=decoding,
      slots=self._slots(self.batch, length),
      prompts=self._slots(self.prompt_rows, self.prompt_width),
      batch=self._trajectories(self.lengths[-1]),
    )

  # --- Sizes, as agent.rollout chooses them ----------------------------------

  @property
  def episodes(self) -> int:
    """Of one iteration."""
    return self.c.rollout.prompts * self.c.rollout.members

  @property
  def batch(self) -> int:
    """Slots that decode together."""
    slots = min(self.c.rollout.slots or self.episodes, self.episodes)
    return rollout.round_up(slots, self.shards)

  @property
  def quarter(self) -> int:
    """Rows of a small prefill."""
    return rollout.round_up(max(self.batch // 4, 1), self.shards)

  @property
  def prompt_rows(self) -> int:
    """Rows of the prefill of the openings: those that each shard needs."""
    prompts, members = self.c.rollout.prompts, self.c.rollout.members
    groups = [p for p in range(prompts) for _ in range(members)]
    return len(homes.Homes.of(groups, range(self.shards)).groups)

  @property
  def prompt_width(self) -> int:
    """Padded tokens of an opening."""
    block = self.c.rollout.observation_block
    return rollout.double_up(self.work.prompt_tokens, block)

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
    decoding, slots = self.parts.decoding, self.parts.slots
    graphdef, prompts = self.model.graphdef, self.parts.prompts
    yield Program('decoding copy', 'rollout', self._copy, 1, ALWAYS)
    waves = -(-self.episodes // self.batch)
    yield Program(
      'prefill of prompts',
      'rollout',
      lambda: sampling.prefill_prompts.trace(
        graphdef,
        decoding,
        *self._ints((self.prompt_rows, self.prompt_width), ()),
        config=self.config,
        dtype=self.model.dtype,
      ),
      1,
      ALWAYS,
    )
    yield Program(
      'admit',
      'rollout',
      lambda: sampling.admit.trace(slots, prompts, *self._per_slot(3)),
      waves,
      (*ALWAYS, 'decoding copy'),
    )
    for view, calls in self._views(self.work.turn_ends()).items():
      yield self._prefill(view, calls * waves)
    for view, calls in self._views(self.work.decoding()).items():
      yield self._decode(view, calls * waves)

  def _prefill(self, view: int, calls: float) -> Program:
    block = self.c.rollout.observation_block
    width = rollout.double_up(self.work.observation_tokens, block)
    sizes = (self.quarter, width)

    def trace():
      tokens_MT, count_M, slot_M, budget_M = self._ints(sizes, (), (), ())
      return sampling.prefill.trace(
        self.model.graphdef,
        self.parts.decoding,
        self.parts.slots,
        *(tokens_MT, count_M, slot_M, budget_M),
        view=view,
      )

    beside = (*ALWAYS, 'prompt cache')
    return Program(f'prefill, view {view}', 'rollout', trace, calls, beside)

  def _decode(self, view: int, calls: float) -> Program:
    steps = self.c.rollout.decode_steps

    def trace():
      return sampling.decode.trace(
        self.model.graphdef,
        self.parts.decoding,
        self.parts.slots,
        self.key,
        self.temperature,
        steps=steps,
        view=view,
        stop_ids=_STOP_IDS,
        ends_early=mesh_lib.slice_count(self.mesh) == 1,
      )

    return Program(
      f'decode, view {view}',
      'rollout',
      trace,
      calls,
      (*ALWAYS, 'prompt cache'),
      trips=steps,
    )

  def _learning(self, length: int) -> Iterator[Program]:
    batch = self._trajectories(length)
    # What only the data decide: tokens that are scored, as pieces of them.
    marked = self.work.sampled_share(length)
    rows = self.step_microbatch // self.shards
    pieces = max(1.0, marked * rows * length / self.c.learner.score_chunk)
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
    most = self.parts.slots.cache.k_BLSN.shape[2]
    block = self.c.rollout.cache_block
    views: dict[int, float] = {}
    for length, calls in lengths.items():
      view = min(rollout.double_up(length, block), most)
      views[view] = views.get(view, 0.0) + calls
    return views

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

  def _per_slot(self, count: int):
    return self._ints((self.batch,), *(() for _ in range(count - 1)))


def _place(x, sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _placed(shapes: Any, where: Any) -> Any:
  return jax.tree.map(_place, shapes, where)


def _recast(shapes: Any, dtype: Any) -> Any:
  """The same arrays in another dtype, where they are."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), shapes
  )
