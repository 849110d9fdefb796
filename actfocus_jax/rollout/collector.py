"""P prompts x G members x K turns -> episodes, with no barrier between turns.

The life of one episode:

1. Its group's environment is reset and the opening is rendered, once.
2. The openings of all groups are prefilled in one call; the episode takes a
   free slot and gets a copy of its group's cache.
3. The device decodes a few steps for all slots, wherever each one stands.
4. The host takes the slots whose turn has ended, reads their answers, steps
   their environments, and prefills the new observations in padded calls of a
   quarter of the slots, for a call needs its slots' caches twice. The cache of
   the earlier turns stays.
5. An episode that is over gives its slot to a waiting one; when none waits
   and most slots are idle, the live ones move together and the rest is
   dropped.

Shapes are few, so that little is compiled: all slots decode, a quarter of them
prefills, observations and cache views have 1, 2, 4, ... blocks.

Every row shard of the mesh has its own episodes, prompts and slots, so that no
cache moves between devices. With several processes all of them follow all
episodes and so decide alike, but each reads, plays and renders those of its own
rows alone, and tells the others what came of it.
"""

import collections
import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from actfocus_jax.model import architecture
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.parallel import processes
from actfocus_jax.rollout import env_pool as env_pool_lib
from actfocus_jax.rollout import episode as episode_lib
from actfocus_jax.rollout import games as games_lib
from actfocus_jax.rollout import host_slots as host_slots_lib
from actfocus_jax.rollout import placement as placement_lib
from actfocus_jax.rollout import sampling
from actfocus_jax.text import chat as chat_lib

Episode = episode_lib.Episode

_FIRST_PROMPTS = 32  # of each game, compared with limits.context
# Below this many slots a step costs about the same however few there are.
LEAST_TO_COMPACT = 32


@dataclasses.dataclass(frozen=True)
class Policy:
  """A model ready to sample: parameters in their decode layout."""

  config: architecture.Config
  graphdef: Any
  params: Any
  dtype: Any


@dataclasses.dataclass(frozen=True)
class Rollout:
  """What `Collector.collect` returns.

  Attributes:
    episodes: P * G of them, group-major: row p * G + g is member g of group p.
    groups: The group of each.
    row_steps: Device work, in decode steps times slots.
    seconds: Wall time.
    env_seconds: Of it, in environments.
  """

  episodes: list[Episode]
  groups: list[int]
  row_steps: int
  seconds: float
  env_seconds: float = 0.0


def joined(parts: Sequence[Rollout]) -> Rollout:
  """Several rollouts as one; groups are numbered on."""
  episodes, groups = [], []
  for part in parts:
    first = groups[-1] + 1 if groups else 0
    episodes += part.episodes
    groups += [first + group for group in part.groups]
  return Rollout(
    episodes,
    groups,
    sum(part.row_steps for part in parts),
    sum(part.seconds for part in parts),
    sum(part.env_seconds for part in parts),
  )


@dataclasses.dataclass(frozen=True)
class Collector:
  """Collects rollouts of some games with one set of shapes.

  Attributes:
    chat: The tokenizer bridge.
    games: What is played: at least one.
    mesh: Slots are sharded over its data and fsdp axes.
    host: Where environments run.
    slots: Most episodes at a time; 0 means all.
    decode_steps: Ids sampled between two looks of the host.
    observation_block: Prompts are padded to 1, 2, 4, ... times this.
    cache_block: Attention reads 1, 2, 4, ... times this many positions.
    ends_early: As of `sampling.decode`; False on a mesh of several slices.
  """

  chat: chat_lib.Chat
  games: tuple[games_lib.Game, ...]
  mesh: jax.sharding.Mesh
  pool: env_pool_lib.EnvPool = dataclasses.field(
    default_factory=env_pool_lib.EnvPool
  )
  slots: int = 0
  decode_steps: int = 8
  observation_block: int = 32
  cache_block: int = 128
  ends_early: bool = True

  @property
  def context(self) -> int:
    """Most ids of any episode."""
    return max(game.limits.context for game in self.games)

  @property
  def shards(self) -> int:
    """Into how many parts the devices split the slots."""
    return mesh_lib.row_shards(self.mesh)

  def collect(
    self,
    policy: Policy,
    seeds: Sequence[int],
    key: jax.Array,
    *,
    members: int,
    temperature: float,
    game: games_lib.Game | None = None,
  ) -> Rollout:
    """Plays `members` episodes from each seed.

    Args:
      policy: Who samples.
      seeds: One a group; they say which of the games it plays.
      key: PRNG key; an id's random number follows from it, the episode's row
        and the id's position.
      members: G.
      temperature: Of sampling.
      game: The one that all play, or None.

    Returns:
      The finished episodes.

    Raises:
      ValueError: When the first prompt leaves no room in the context.
    """
    begin, env_begin = time.perf_counter(), self.pool.seconds
    groups = [p for p in range(len(seeds)) for _ in range(members)]
    homes = placement_lib.ShardPlacement.of(
      groups, mesh_lib.row_owners(self.mesh)
    )
    openings = self.open(seeds, game, homes.owners_of_groups(groups))
    episodes = [Episode(self.chat, openings[p]) for p in groups]
    run = _Run(self, policy, key, temperature, openings, episodes, homes)
    run.play()
    seconds = time.perf_counter() - begin
    env_seconds = self.pool.seconds - env_begin
    return Rollout(episodes, groups, run.row_steps, seconds, env_seconds)

  def open(
    self,
    seeds: Sequence[int],
    game: games_lib.Game | None = None,
    owners: Sequence[Collection[int]] | None = None,
  ) -> list[episode_lib.Opening]:
    """Resets the environments; refuses a prompt that fills the context."""
    played = [game or games_lib.pick(self.games, seed) for seed in seeds]
    openings = episode_lib.open_all(self.chat, self.pool, played, seeds, owners)
    for opening in openings:
      check_opening(opening)
    return openings


def check_opening(opening: episode_lib.Opening):
  """Raises ValueError when the first prompt leaves no room to answer."""
  limits = opening.game.limits
  if len(opening.ids) >= limits.context:
    raise ValueError(
      f'limits.context is {limits.context}, but the first prompt alone has '
      f'{len(opening.ids)} tokens; allowed is anything above that, and '
      f'{len(opening.ids) + limits.response_tokens} leaves room for one answer.'
    )


def check_first_prompts(
  chat: chat_lib.Chat,
  games: Sequence[games_lib.Game],
  pool: env_pool_lib.EnvPool,
  seeds: Sequence[int],
):
  """Refuse a context that a first prompt fills, before a run is touched.

  Args:
    chat: tokenizer bridge.
    games: games of the run.
    pool: pool that resets the environments.
    seeds: seeds of boards; the first `_FIRST_PROMPTS` are tried.

  Raises:
    ValueError: a prompt is too long, or every reset of a game fails.
  """
  seeds = seeds[:_FIRST_PROMPTS]
  for game in games:
    openings = episode_lib.open_all(chat, pool, [game] * len(seeds), seeds)
    for opening in openings:
      if not opening.failure:
        check_opening(opening)
    if all(opening.failure for opening in openings):
      raise ValueError(
        f'{game.name}: the environment failed to reset with each of the seeds '
        f'{seeds[0]} to {seeds[-1]}, first: {openings[0].failure.reason}'
      )


class _Run:
  """One call of `Collector.collect`: the device's slots, the host's lanes."""

  def __init__(
    self, shape: Collector, policy, key, temperature, openings, episodes, homes
  ):
    self.c = shape
    self.policy = policy
    self.key = key
    self.temperature = np.float32(temperature)
    self.episodes = episodes
    self.homes = homes
    self.waiting = [collections.deque() for _ in range(shape.shards)]
    for row, episode in enumerate(episodes):
      if not episode.over:
        self.waiting[self.homes.shard[row]].append(row)
    self.row_steps = 0
    batch = min(shape.slots or len(episodes), len(episodes))
    batch = round_up(batch, shape.shards)
    most = max(game.limits.response_tokens for game in shape.games)
    self.lanes = host_slots_lib.HostSlots(batch, most)
    self.prompts = self._prefill_prompts(openings)
    cache_length = round_up(shape.context, shape.cache_block)
    self.slots = sampling.empty_on(
      shape.mesh, policy.config, batch, cache_length, policy.dtype
    )

  def play(self):
    """Until every episode is over."""
    while True:
      self._admit()
      if not self.lanes.live_B.any():
        return
      self._compact()
      self._prefill(self._finish_turns(self._decode()))

  # --- The four device calls, with the host's part of each -------------------

  def _admit(self):
    if not any(self.waiting):
      return
    group_B, row_B, budget_B = self._int_rows(3)
    group_B -= 1
    for slot in (~self.lanes.live_B).nonzero()[0].tolist():
      waiting = self.waiting[self._shard(slot)]
      if not waiting:
        continue
      row = waiting.popleft()
      self._start(slot, row)
      group_B[slot], row_B[slot] = self.homes.prompt[row], row
      budget_B[slot] = self.lanes.budget_B[slot]
    if (group_B >= 0).any():
      self.slots = sampling.admit(
        self.slots, self.prompts, *self._rows(group_B, row_B, budget_B)
      )

  def _decode(self) -> list[int]:
    """Decodes and returns the slots whose turn has ended."""
    self.slots, out = sampling.decode(
      self.policy.graphdef,
      self.policy.params,
      self.slots,
      self.key,
      self.temperature,
      steps=self.c.decode_steps,
      view=self._view(self.lanes.longest + self.c.decode_steps),
      stop_ids=self.c.chat.stop_ids,
      ends_early=self.c.ends_early,
    )
    out = jax.device_get(out)
    steps = self.c.decode_steps
    if self.c.ends_early:
      steps = int(out.live_NB.any(axis=1).sum())
    self.row_steps += steps * len(self.lanes)
    ended = self.lanes.take(
      out.token_NB, out.logprob_NB, out.live_NB, self.c.chat.stop_ids
    )
    return ended.tolist()

  def _finish_turns(self, ended: list[int]) -> dict[int, list[int]]:
    """Plays the ended turns; returns the observation ids by slot."""
    rows = self.lanes.row_B[ended].tolist()
    for slot, row in zip(ended, rows, strict=True):
      self.episodes[row].add_response(*self.lanes.said(slot))
    concluded = self._play_turns(rows)
    observations = {}
    for slot, row in zip(ended, rows, strict=True):
      if concluded[row].ids is None:
        self.lanes.leave(slot)
      else:
        observations[slot] = concluded[row].ids
        self._start(slot, row)
    return observations

  def _play_turns(self, rows: list[int]) -> dict[int, episode_lib.TurnOutcome]:
    """Each process reads, plays and renders its own, and tells the others."""
    if not rows:
      return {}
    me = processes.index()
    own = [row for row in rows if self.homes.owner[row] == me]
    outcomes = self.c.pool.run([self.episodes[row].env_call() for row in own])
    concluded = {
      row: self.episodes[row].apply(outcome)
      for row, outcome in zip(own, outcomes, strict=True)
    }
    others = {}
    for process, words in enumerate(processes.allgather(concluded)):
      if process != me:
        others |= words
    for row, words in others.items():
      self.episodes[row].sync(words)
    return concluded | others

  def _start(self, slot: int, row: int):
    """The next turn of an episode begins in a slot."""
    episode = self.episodes[row]
    self.lanes.start(slot, row, len(episode.ids), episode.token_budget)

  def _prefill(self, observations: dict[int, list[int]]):
    by_shard: list[list[int]] = [[] for _ in range(self.c.shards)]
    for slot in observations:
      by_shard[self._shard(slot)].append(slot)
    quarter = self._quarter()
    for first in range(0, max(map(len, by_shard)), quarter):
      some = [slots[first : first + quarter] for slots in by_shard]
      self._append(some, observations)

  def _append(self, by_shard: list[list[int]], observations):
    """Prefills the observations of these slots, at most a quarter of all."""
    size, each = self._quarter(), self._each()
    chosen = [slot for slots in by_shard for slot in slots]
    width = max(len(observations[slot]) for slot in chosen)
    width = double_up(width, self.c.observation_block)
    rows = self.c.shards * size
    tokens_MT = np.zeros((rows, width), np.int32)
    count_M = np.ones((rows,), np.int32)
    slot_M = np.full((rows,), each, np.int32)
    budget_M = np.zeros((rows,), np.int32)
    for shard, slots in enumerate(by_shard):
      for i, slot in enumerate(slots, shard * size):
        ids = observations[slot]
        tokens_MT[i, : len(ids)] = ids
        count_M[i], slot_M[i] = len(ids), slot % each
        budget_M[i] = self.lanes.budget_B[slot]
    view = self._view(self.lanes.length_B[chosen].max())
    self.slots = sampling.prefill(
      self.policy.graphdef,
      self.policy.params,
      self.slots,
      *self._rows(tokens_MT, count_M, slot_M, budget_M),
      view=view,
    )

  def _compact(self):
    """Drops slots when a quarter of each shard's holds all its episodes."""
    quarter, each = self._quarter(), self._each()
    if len(self.lanes) < LEAST_TO_COMPACT or quarter == each:
      return
    live_SN = self.lanes.live_B.reshape(-1, each)
    if live_SN.sum(axis=1).max() > quarter:
      return
    # Of each shard the live ones first, all in their order.
    order_SN = np.argsort(~live_SN, axis=1, kind='stable')
    keep_SN = order_SN[:, :quarter].astype(np.int32)
    first_S1 = np.arange(0, len(self.lanes), each)[:, None]
    self.lanes.keep((first_S1 + keep_SN).reshape(-1))
    (keep_M,) = self._rows(keep_SN.reshape(-1))
    self.slots = sampling.compact(self.slots, keep_M)

  # --- Shapes and placement --------------------------------------------------

  def _prefill_prompts(self, openings):
    prompts = [openings[group] for group in self.homes.groups]
    width = max(len(opening.ids) for opening in openings)
    width = double_up(width, self.c.observation_block)
    tokens_PT = np.zeros((len(prompts), width), np.int32)
    length_P = np.ones((len(prompts),), np.int32)
    for p, opening in enumerate(prompts):
      tokens_PT[p, : len(opening.ids)] = opening.ids
      length_P[p] = len(opening.ids)
    return sampling.prefill_prompts(
      self.policy.graphdef,
      self.policy.params,
      *self._rows(tokens_PT, length_P),
      config=self.policy.config,
      dtype=self.policy.dtype,
    )

  def _each(self) -> int:
    """Slots of a shard."""
    return len(self.lanes) // self.c.shards

  def _quarter(self) -> int:
    return max(-(-(len(self.lanes) // 4) // self.c.shards), 1)

  def _shard(self, slot: int) -> int:
    return slot // self._each()

  def _view(self, longest: int) -> int:
    view = double_up(min(longest, self.c.context), self.c.cache_block)
    return min(view, self.slots.cache.k_BLSN.shape[2])

  def _int_rows(self, count: int) -> list[np.ndarray]:
    return [np.zeros((len(self.lanes),), np.int32) for _ in range(count)]

  def _rows(self, *arrays):
    return mesh_lib.put_rows(self.c.mesh, arrays)


def double_up(n: int, block: int) -> int:
  """The first of block, 2 * block, 4 * block, ... that is at least n."""
  while block < n:
    block *= 2
  return block


def round_up(n: int, multiple: int) -> int:
  """The first multiple that is at least n."""
  return -(-n // multiple) * multiple
