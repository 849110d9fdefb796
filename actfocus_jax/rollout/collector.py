"""Collect episodes: P prompts x G members x K turns, no barrier between turns.

The stages of one episode:

1. The environment of its group is reset and the opening is rendered, once.
2. The openings of all groups are prefilled in one call. The episode takes a
   free slot and gets a copy of its group's cache.
3. The device decodes a few steps for all slots at once.
4. The host takes the slots whose turn has ended, parses their answers, steps
   their environments, and prefills the new observations. The cache of the
   earlier turns stays. One prefill call takes a quarter of the slots, because
   a call holds the caches of its slots twice.
5. A finished episode gives its slot to a waiting one. When none waits and most
   slots are idle, the live slots are compacted and the others dropped.

Few shapes are compiled: all slots decode, a quarter of them prefills, and
observations and cache views have 1, 2, 4, ... blocks.

Every row shard of the mesh has its own episodes, prompts and slots, so no
cache moves between devices. With several processes each one tracks all
episodes and takes the same decisions. A process plays and renders the episodes
of its own rows and sends the outcomes to the others.
"""

import collections
import dataclasses
import time
from collections.abc import Sequence
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
# With fewer slots than this, dropping some hardly makes a step faster.
LEAST_TO_COMPACT = 32


@dataclasses.dataclass(frozen=True)
class Policy:
  """Model and its `params` in the decode layout; `dtype` of the cache."""

  config: architecture.Config
  graphdef: Any
  params: Any
  dtype: Any


@dataclasses.dataclass(frozen=True)
class Rollout:
  """Finished episodes and what they cost.

  Attributes:
    episodes: P * G episodes, group-major: row p * G + g is member g of group p.
    groups: group index of each episode.
    row_steps: decode steps times slots.
    seconds: wall time of the whole rollout.
    env_seconds: wall time spent in environments.
  """

  episodes: list[Episode]
  groups: list[int]
  row_steps: int
  seconds: float
  env_seconds: float = 0.0


def concatenate(parts: Sequence[Rollout]) -> Rollout:
  """Return several rollouts as one, with consecutive group numbers."""
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
    chat: tokenizer bridge.
    games: the games that are played, at least one.
    mesh: device mesh; slots are sharded over its data and fsdp axes.
    pool: runs the environments.
    slots: largest number of episodes at a time; 0 means all.
    decode_steps: ids that one device call samples per slot.
    observation_block: prompts are padded to 1, 2, 4, ... times this length.
    cache_block: attention reads 1, 2, 4, ... times this many positions.
    ends_early: see `sampling.decode`; False on a mesh of several slices.
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
    """Largest number of ids in any episode."""
    return max(game.limits.context for game in self.games)

  @property
  def shards(self) -> int:
    """Number of row shards of the mesh."""
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
    """Play `members` episodes from each seed.

    Args:
      policy: the model that samples.
      seeds: one seed a group; it also selects the game of the group.
      key: PRNG key. The random number of an id depends on the key, the row of
        the episode and the position of the id.
      members: G.
      temperature: divides the logits.
      game: the game of all groups, or None to select by seed.

    Raises:
      ValueError: if the first prompt leaves no room in the context.
    """
    begin, env_begin = time.perf_counter(), self.pool.seconds
    groups = [p for p in range(len(seeds)) for _ in range(members)]
    placement = placement_lib.ShardPlacement.of(
      groups, mesh_lib.row_owners(self.mesh)
    )
    played = [game or games_lib.pick(self.games, seed) for seed in seeds]
    owners = placement.owners_of_groups(groups)
    openings = episode_lib.open_all(self.chat, self.pool, played, seeds, owners)
    for opening in openings:
      check_opening(opening)
    episodes = [Episode(self.chat, openings[p]) for p in groups]
    run = _Run(self, policy, key, temperature, openings, episodes, placement)
    run.play()
    return Rollout(
      episodes,
      groups,
      run.row_steps,
      seconds=time.perf_counter() - begin,
      env_seconds=self.pool.seconds - env_begin,
    )


def check_opening(opening: episode_lib.Opening):
  """Raise ValueError if the first prompt leaves no room for an answer."""
  limits = opening.game.limits
  if len(opening.ids) >= limits.context:
    raise ValueError(
      f'limits.context is {limits.context}, but the first prompt alone has '
      f'{len(opening.ids)} tokens; allowed: more than that, such as '
      f'{len(opening.ids) + limits.response_tokens} for one full answer.'
    )


def check_first_prompts(
  chat: chat_lib.Chat,
  games: Sequence[games_lib.Game],
  pool: env_pool_lib.EnvPool,
  seeds: Sequence[int],
):
  """Refuse a context that one of the first 32 prompts fills.

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
  """State of one `Collector.collect` call: slots on the device and the host."""

  def __init__(
    self, collector, policy, key, temperature, openings, episodes, placement
  ):
    self.c: Collector = collector
    self.policy, self.key = policy, key
    self.temperature = np.float32(temperature)
    self.episodes, self.placement = episodes, placement
    self.waiting = [collections.deque() for _ in range(collector.shards)]
    for row, episode in enumerate(episodes):
      if not episode.over:
        self.waiting[self.placement.shard[row]].append(row)
    self.row_steps = 0
    batch = min(collector.slots or len(episodes), len(episodes))
    batch = round_up(batch, collector.shards)
    longest = max(game.limits.response_tokens for game in collector.games)
    self.host_slots = host_slots_lib.HostSlots(batch, longest)
    self.prompts = self._prefill_prompts(openings)
    cache_length = round_up(collector.context, collector.cache_block)
    self.slots = sampling.empty_on(
      collector.mesh, policy.config, batch, cache_length, policy.dtype
    )

  def play(self):
    """Play until every episode is over."""
    while True:
      self._admit()
      if not self.host_slots.live_B.any():
        return
      self._compact()
      self._prefill(self._finish_turns(self._decode()))

  # --- Device calls and the host work around them ----------------------------

  def _admit(self):
    if not any(self.waiting):
      return
    group_B, row_B, budget_B = np.zeros((3, len(self.host_slots)), np.int32)
    group_B -= 1
    for slot in (~self.host_slots.live_B).nonzero()[0].tolist():
      waiting = self.waiting[self._shard(slot)]
      if not waiting:
        continue
      row = waiting.popleft()
      self._start(slot, row)
      group_B[slot], row_B[slot] = self.placement.prompt[row], row
      budget_B[slot] = self.host_slots.budget_B[slot]
    if (group_B >= 0).any():
      self.slots = sampling.admit(
        self.slots, self.prompts, *self._rows(group_B, row_B, budget_B)
      )

  def _decode(self) -> list[int]:
    """Decode a few steps; return the slots whose turn has ended."""
    self.slots, out = sampling.decode(
      self.policy.graphdef,
      self.policy.params,
      self.slots,
      self.key,
      self.temperature,
      steps=self.c.decode_steps,
      view=self._view(self.host_slots.longest + self.c.decode_steps),
      stop_ids=self.c.chat.stop_ids,
      ends_early=self.c.ends_early,
    )
    out = jax.device_get(out)
    steps = self.c.decode_steps
    if self.c.ends_early:
      steps = int(out.live_NB.any(axis=1).sum())
    self.row_steps += steps * len(self.host_slots)
    ended = self.host_slots.take(
      out.token_NB, out.logprob_NB, out.live_NB, self.c.chat.stop_ids
    )
    return ended.tolist()

  def _finish_turns(self, ended: list[int]) -> dict[int, list[int]]:
    """Play the ended turns; return the observation ids by slot."""
    rows = self.host_slots.row_B[ended].tolist()
    for slot, row in zip(ended, rows, strict=True):
      self.episodes[row].add_response(*self.host_slots.sampled(slot))
    outcomes = self._play_turns(rows)
    observations = {}
    for slot, row in zip(ended, rows, strict=True):
      if outcomes[row].ids is None:
        self.host_slots.leave(slot)
      else:
        observations[slot] = outcomes[row].ids
        self._start(slot, row)
    return observations

  def _play_turns(self, rows: list[int]) -> dict[int, episode_lib.TurnOutcome]:
    """Play the turns of these rows; return the outcome of each.

    Each process plays its own rows and receives the outcomes of the others.
    """
    if not rows:
      return {}
    me = processes.index()
    local_rows = [row for row in rows if self.placement.owner[row] == me]
    results = self.c.pool.run(
      [self.episodes[row].env_call() for row in local_rows]
    )
    outcomes = {
      row: self.episodes[row].apply(result)
      for row, result in zip(local_rows, results, strict=True)
    }
    others = {}
    for process, received in enumerate(processes.allgather(outcomes)):
      if process != me:
        others |= received
    for row, outcome in others.items():
      self.episodes[row].sync(outcome)
    return outcomes | others

  def _start(self, slot: int, row: int):
    """Begin the next turn of an episode in a slot."""
    episode = self.episodes[row]
    self.host_slots.start(slot, row, len(episode.ids), episode.token_budget)

  def _prefill(self, observations: dict[int, list[int]]):
    by_shard: list[list[int]] = [[] for _ in range(self.c.shards)]
    for slot in observations:
      by_shard[self._shard(slot)].append(slot)
    quarter = self._quarter()
    for first in range(0, max(map(len, by_shard)), quarter):
      some = [slots[first : first + quarter] for slots in by_shard]
      self._append(some, observations)

  def _append(self, by_shard: list[list[int]], observations):
    """Prefill the observations of some slots, at most a quarter of all."""
    size, each = self._quarter(), self._each()
    chosen = [slot for slots in by_shard for slot in slots]
    width = max(len(observations[slot]) for slot in chosen)
    width = double_up(width, self.c.observation_block)
    rows = self.c.shards * size
    tokens_MT = np.zeros((rows, width), np.int32)
    count_M, slot_M, budget_M = np.zeros((3, rows), np.int32)
    count_M[:], slot_M[:] = 1, each  # A padding row has an id and no slot.
    for shard, slots in enumerate(by_shard):
      for i, slot in enumerate(slots, shard * size):
        ids = observations[slot]
        tokens_MT[i, : len(ids)] = ids
        count_M[i], slot_M[i] = len(ids), slot % each
        budget_M[i] = self.host_slots.budget_B[slot]
    view = self._view(self.host_slots.length_B[chosen].max())
    self.slots = sampling.prefill(
      self.policy.graphdef,
      self.policy.params,
      self.slots,
      *self._rows(tokens_MT, count_M, slot_M, budget_M),
      view=view,
    )

  def _compact(self):
    """Keep a quarter of the slots if that holds the live ones of each shard."""
    quarter, each = self._quarter(), self._each()
    if len(self.host_slots) < LEAST_TO_COMPACT or quarter == each:
      return
    live_SN = self.host_slots.live_B.reshape(-1, each)
    if live_SN.sum(axis=1).max() > quarter:
      return
    # In each shard the live slots come first; the order is kept.
    order_SN = np.argsort(~live_SN, axis=1, kind='stable')
    keep_SN = order_SN[:, :quarter].astype(np.int32)
    first_S1 = np.arange(0, len(self.host_slots), each)[:, None]
    self.host_slots.keep((first_S1 + keep_SN).reshape(-1))
    (keep_M,) = self._rows(keep_SN.reshape(-1))
    self.slots = sampling.compact(self.slots, keep_M)

  # --- Shapes and placement --------------------------------------------------

  def _prefill_prompts(self, openings):
    prompts = [openings[group] for group in self.placement.groups]
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
    """Number of slots in a shard."""
    return len(self.host_slots) // self.c.shards

  def _quarter(self) -> int:
    return max(-(-(len(self.host_slots) // 4) // self.c.shards), 1)

  def _shard(self, slot: int) -> int:
    return slot // self._each()

  def _view(self, longest: int) -> int:
    view = double_up(min(longest, self.c.context), self.c.cache_block)
    return min(view, self.slots.cache.k_BLSN.shape[2])

  def _rows(self, *arrays):
    return mesh_lib.put_rows(self.c.mesh, arrays)


def double_up(n: int, block: int) -> int:
  """Return the first of block, 2 * block, 4 * block, ... not below n."""
  while block < n:
    block *= 2
  return block


def round_up(n: int, multiple: int) -> int:
  """Return the first multiple not below n."""
  return -(-n // multiple) * multiple
