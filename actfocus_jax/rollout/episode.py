"""One conversation between a policy and an environment, on the host.

Rollouts and demonstrations both use `Episode`, so the warm start trains on
exactly the ids of later rollouts. The author of an id (policy, environment or
template) is recorded when the id is written.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Collection, Sequence

import numpy as np

from actfocus_jax.algorithm import trajectory
from actfocus_jax.envs import base
from actfocus_jax.rollout import env_pool, games
from actfocus_jax.text import chat as chat_lib


@dataclasses.dataclass(frozen=True)
class Opening:
  """The start of an episode, shared by all members of its group."""

  game: games.Game
  state: object
  text: str  # Text of the state.
  ids: tuple[int, ...]  # First prompt.
  system_count: int  # Number of ids of the system message.
  failure: env_pool.Failed | None = None  # Reason why the reset failed.


@dataclasses.dataclass(frozen=True)
class Turn:
  """A turn: `ids[prompt:start]` is the prompt, `ids[start:stop]` is sampled."""

  prompt: int
  start: int
  stop: int
  anchor: int
  response: chat_lib.Response
  result: base.TurnResult


def open_all(
  chat,
  pool: env_pool.EnvPool,
  played: Sequence[games.Game],
  seeds: Sequence[int],
  owners: Sequence[Collection[int]] | None = None,
) -> list[Opening]:
  """Reset the environment of each seed and render the first prompts.

  `owners` lists the processes that play each seed and makes this a collective
  call, as `EnvPool.run_and_share` is; without it this process plays all. An
  opening whose reset failed has a `failure`.
  """
  calls = [
    functools.partial(base.reset, game.env, seed)
    for game, seed in zip(played, seeds, strict=True)
  ]
  resets = pool.run_and_share(calls, owners) if owners else pool.run(calls)
  return [opening(chat, *each) for each in zip(played, resets, strict=True)]


def opening(chat, game: games.Game, reset) -> Opening:
  """Render the first prompt after `base.reset`, or after its failure.

  Without a state the prompt is never answered.
  """
  failure = reset if isinstance(reset, env_pool.Failed) else None
  state, text = (None, '') if failure else reset
  limits = game.limits
  system = chat_lib.system_message(
    game.env.instructions,
    budget=limits.action_budget,
    max_actions=limits.max_actions,
  )
  user = chat_lib.turn_message(
    text,
    turn=1,
    reward=None,
    actions_left=limits.action_budget,
    response_tokens=limits.response_tokens,
  )
  ids, system_count = chat.opening(system, user)
  return Opening(game, state, text, tuple(ids), system_count, failure)


def anchor_of(text: str) -> int:
  """Return the fingerprint of a state, an int32: the CRC of its text."""
  return zlib.crc32(text.encode()) - 2**31


@dataclasses.dataclass(frozen=True)
class TurnOutcome:
  """Outcome of a turn, as sent to processes that do not play it.

  If the environment failed, `failure` is set and the rest is empty.
  """

  response: chat_lib.Response | None = None
  result: base.TurnResult | None = None
  ids: list[int] | None = None  # Next prompt; None: the episode is over.
  truncated: bool = False  # The context ended the episode.
  failure: env_pool.Failed | None = None


class Episode:
  """Ids with their provenance, and the state of the environment.

  Attributes:
    ids: all ids so far.
    turns: the finished turns.
    truncated: true if the context ended the episode.
    over: true if no more ids will be sampled.
    failure: reason why the environment failed, or None.
    game: environment and limits.
    state: state of the environment; None if another process plays it.
    text: text of the state.
  """

  def __init__(self, chat, opening: Opening):
    """Start from an opening; the first response comes next."""
    self._chat = chat
    self._limits = opening.game.limits
    self._system_count = opening.system_count
    self._logprobs: list[float] = []
    self._prompt = self._start = 0
    self._response: chat_lib.Response | None = None
    self.game = opening.game
    self.state, self.text = opening.state, opening.text
    self.ids = list(opening.ids)
    self.turns: list[Turn] = []
    self.truncated = False
    self.failure = opening.failure
    self.over = self.failure is not None

  @property
  def token_budget(self) -> int:
    """Largest number of ids in the next response."""
    room = self._limits.context - len(self.ids)
    return min(self._limits.response_tokens, room)

  def respond(
    self, sampled: Sequence[int], logprobs: Sequence[float]
  ) -> list[int] | None:
    """Add a response, play its turn and render the next prompt.

    Args:
      sampled: ids as sampled, stop id included if there is one.
      logprobs: behaviour log-prob of each id.

    Returns:
      The ids of the next prompt increment, or None when the episode is over.
    """
    self.add_response(sampled, logprobs)
    return self.apply(self.env_call()()).ids

  def add_response(self, sampled: Sequence[int], logprobs: Sequence[float]):
    """Add the ids and log-probs of a response; the first part of `respond`."""
    self.ids.extend(sampled)
    self._logprobs.extend(logprobs)
    self._start = len(self.ids) - len(sampled)

  def env_call(self) -> Callable[[], tuple[base.State, base.TurnResult]]:
    """Parse the response; return the call that plays it.

    The call changes nothing in this object, so another thread can make it.
    """
    self._response = self._chat.read(self.ids[self._start :])
    return functools.partial(
      base.play_turn,
      self.game.env,
      self.state,
      self.text,
      self._response.answer,
      budget=self.actions_left,
      max_actions=self._limits.max_actions,
      format_penalty=self._limits.format_penalty,
    )

  def apply(
    self, outcome: tuple[base.State, base.TurnResult] | env_pool.Failed
  ) -> TurnOutcome:
    """Apply the result, or failure, of `env_call`; render the next prompt.

    Returns:
      The outcome that other processes apply with `sync`.
    """
    if isinstance(outcome, env_pool.Failed):
      self.failure, self.over = outcome, True
      return TurnOutcome(failure=outcome)
    self.state, result = outcome
    self._finish(self._response, result)
    ids = self._next_prompt(result)
    return TurnOutcome(self._response, result, ids, self.truncated)

  def sync(self, outcome: TurnOutcome):
    """Apply the outcome of a turn that another process has played."""
    self.state, self.failure = None, outcome.failure
    if not self.failure:
      self._finish(outcome.response, outcome.result)
    self.truncated, self.over = outcome.truncated, outcome.ids is None
    self.ids.extend(outcome.ids or ())

  def _finish(self, response: chat_lib.Response, result: base.TurnResult):
    stop, anchor = len(self.ids), anchor_of(self.text)
    self.turns.append(
      Turn(self._prompt, self._start, stop, anchor, response, result)
    )
    self._prompt, self.text = stop, result.text

  def _next_prompt(self, result: base.TurnResult) -> list[int] | None:
    spent = self.actions_left <= 0 or len(self.turns) >= self._limits.turns
    if result.done or spent:
      self.over = True
      return None
    user = chat_lib.turn_message(
      result.text,
      turn=len(self.turns) + 1,
      reward=result.reward,
      actions_left=self.actions_left,
      response_tokens=self._limits.response_tokens,
    )
    ids = self._chat.continuation(user, last_id=self.ids[-1])
    if len(self.ids) + len(ids) >= self._limits.context:
      self.over = self.truncated = True
      return None
    self.ids.extend(ids)
    return ids

  @property
  def actions_left(self) -> int:
    """Actions left of the budget of the episode."""
    used = sum(turn.result.actions_used for turn in self.turns)
    return self._limits.action_budget - used

  @property
  def success(self) -> bool:
    """True if the environment declared the episode solved."""
    return any(turn.result.success for turn in self.turns)

  @property
  def episode_return(self) -> float:
    """Sum of rewards and format penalties."""
    return sum(turn.result.reward + turn.result.penalty for turn in self.turns)

  @property
  def sampled_count(self) -> int:
    """Number of ids written by the policy."""
    return len(self._logprobs)

  def logprobs(self, turn: Turn) -> list[float]:
    """Return the behaviour log-probs of the sampled ids of a turn."""
    before = sum(t.stop - t.start for t in self.turns if t.start < turn.start)
    return self._logprobs[before : before + turn.stop - turn.start]

  def write_row(self, batch: trajectory.Trajectory, row: int):
    """Fill one row of a host `Trajectory` that holds only padding."""
    length = len(self.ids)
    batch.tokens[row, :length] = self.ids
    batch.valid[row, :length] = True
    if self.failure:  # The reward of its tokens is unknown.
      return
    for index, turn in enumerate(self.turns):
      span = slice(turn.start, turn.stop)
      batch.sampled[row, span] = True
      batch.action[row, span] = turn.response.action
      batch.turn[row, turn.prompt : turn.stop] = index
      batch.anchor[row, turn.prompt : turn.stop] = turn.anchor
      batch.turn_end[row, turn.stop - 1] = True
      batch.logprob[row, span] = self.logprobs(turn)
      result = turn.result
      batch.reward[row, turn.stop - 1] = result.reward + result.penalty
    # A prompt without a response opens a turn too.
    batch.turn[row, self._prompt : length] = len(self.turns)
    batch.turn[row, : self._system_count] = -1
    batch.anchor[row, : self._system_count] = 0
    batch.success[row] = self.success


def to_trajectory(
  episodes: Sequence[Episode], groups: Sequence[int], *, length: int, pad: int
) -> trajectory.Trajectory:
  """Return finished episodes as one batch, right-padded to `length`.

  An episode whose environment failed has no sampled token, so nothing is
  learned from it. Its reward is the mean return of the others in its group, so
  it does not move their baseline.
  """
  shape = (len(episodes), length)
  batch = trajectory.Trajectory(
    tokens=np.full(shape, pad, np.int32),
    valid=np.zeros(shape, bool),
    sampled=np.zeros(shape, bool),
    action=np.zeros(shape, bool),
    turn=np.full(shape, -1, np.int32),
    turn_end=np.zeros(shape, bool),
    anchor=np.zeros(shape, np.int32),
    logprob=np.zeros(shape, np.float32),
    reward=np.zeros(shape, np.float32),
    group=np.asarray(groups, np.int32),
    success=np.zeros(shape[:1], bool),
  )
  for row, episode in enumerate(episodes):
    episode.write_row(batch, row)
    if episode.failure:
      others = [
        other.episode_return
        for other, group in zip(episodes, groups, strict=True)
        if group == groups[row] and not other.failure
      ]
      batch.reward[row, len(episode.ids) - 1] = np.mean(others or 0.0)
  return batch
