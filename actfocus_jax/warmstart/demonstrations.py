"""Demonstrations: episodes of a scripted player in place of the policy.

If the environment fails, its demonstration is lost; if nearly all of a game are
lost, this is an error. A demonstration ends before a response that is longer
than the limit; if most of a game do, the limit is refused.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from actfocus_jax.rollout import env_pool, games
from actfocus_jax.rollout import episode as episode_lib
from actfocus_jax.text import tokenizer as tokenizer_lib
from actfocus_jax.text.chat import Chat

# (game, player) pairs. A player has the method
# `respond(env, state, rng) -> (thought, actions)`.
Cast = Sequence[tuple[games.Game, Any]]
# A game that loses more than this share of its demonstrations is refused, after
# the first `_SOON` losses or at the end.
_MOST_LOST = 0.9
_MOST_CUT = 0.5  # the same for those that end before a response
_SOON = 32


def play(
  chat: Chat,
  cast: Cast,
  seeds: Iterable[int],
  *,
  pool: env_pool.EnvPool | None = None,
  report: Callable[[str], Any] = lambda line: None,
) -> list[episode_lib.Episode]:
  """Play one episode per seed, in the form of a rollout.

  Args:
    chat: tokenizer bridge.
    cast: (game, player) pairs; the seed picks one of them.
    seeds: seeds of the environment and of the player's choices.
    pool: pool that runs the environments; by default this thread does.
    report: called with a line about each game that lost some.

  Returns:
    Finished episodes, without those whose environment failed. Their log-probs
    are 0, since no policy sampled them.

  Raises:
    ValueError: most demonstrations of a game have a response that is longer
      than its limit, or nearly all were lost.
  """
  pool = pool or env_pool.EnvPool()
  players = {game.name: player for game, player in cast}
  tallies = {game.name: _Tally(game) for game, _ in cast}
  played = [game for game, _ in cast]
  episodes = []
  for seed in seeds:
    game = games.pick(played, seed)
    tally = tallies[game.name]
    episode, too_long = _play_one(chat, game, players[game.name], seed, pool)
    tally.count(episode, too_long)
    if episode.turns and not episode.failure:
      episodes.append(episode)
  for tally in tallies.values():
    tally.close(report)
  return episodes


@dataclasses.dataclass
class _Tally:
  """Counts of the demonstrations of a game: played, lost, cut short."""

  game: games.Game
  played: int = 0
  failures: list[env_pool.Failed] = dataclasses.field(default_factory=list)
  too_long: list[int] = dataclasses.field(default_factory=list)  # in tokens

  def count(self, episode: episode_lib.Episode, too_long: int | None):
    self.played += 1
    self.failures += filter(None, [episode.failure])
    self.too_long += filter(None, [too_long])
    if max(len(self.failures), len(self.too_long)) >= _SOON:
      self._check()

  def close(self, report: Callable[[str], Any]):
    self._check()
    if self.failures:
      report(self._lost())
    if self.too_long:
      report(self._cut())

  def _check(self):
    if len(self.failures) > _MOST_LOST * self.played:
      raise ValueError(f'{self._lost()}. A warm start needs more of them.')
    if len(self.too_long) > _MOST_CUT * self.played:
      raise ValueError(
        f'{self._cut()}; allowed: {max(self.too_long)} or more, which fits '
        'those seen so far.'
      )

  def _lost(self) -> str:
    return (
      f'{self.game.name}: the environment failed in {len(self.failures)} of '
      f'{self.played} demonstrations, first: {self.failures[0].reason}'
    )

  def _cut(self) -> str:
    return (
      f'limits.response_tokens is {self.game.limits.response_tokens}, which '
      f'cuts {len(self.too_long)} of {self.played} demonstrations of '
      f'{self.game.name} short: they have responses of up to '
      f'{max(self.too_long)} tokens'
    )


def _play_one(
  chat, game: games.Game, player, seed: int, pool: env_pool.EnvPool
) -> tuple[episode_lib.Episode, int | None]:
  """Return an episode, and the length of the response that was too long."""
  rng = np.random.default_rng((seed, 1))
  limits = game.limits
  (opening,) = episode_lib.open_all(chat, pool, [game], [seed])
  episode = episode_lib.Episode(chat, opening)
  while not episode.over:
    try:
      thought, actions = player.respond(game.env, episode.state, rng)
    except (Exception, SystemExit) as error:  # Users' code.
      raise ValueError(
        f'{game.name}: the player {type(player).__name__} failed with seed '
        f'{seed}, {type(error).__name__}: {error}'
      ) from error
    ids = chat.respond(thought, actions)
    if len(ids) > limits.response_tokens:
      return episode, len(ids)
    if len(ids) > episode.token_budget:  # The context ends here.
      break
    episode.add_response(ids, [0.0] * len(ids))
    (outcome,) = pool.run([episode.env_call()])
    episode.apply(outcome)
  return episode, None


def train_tokenizer(
  cast: Cast,
  seeds: Iterable[int],
  vocab_size: int,
  *,
  pool: env_pool.EnvPool | None = None,
):
  """Train a tokenizer on the conversations of environments and players.

  The conversations are first encoded as plain bytes, by the same renderer;
  token limits are not applied. `vocab_size` is an upper limit.
  """
  in_bytes = Chat(tokenizer_lib.train([]))
  roomy = []
  for game, player in cast:
    limits = dataclasses.replace(
      game.limits, response_tokens=10**6, context=10**8
    )
    roomy.append((dataclasses.replace(game, limits=limits), player))
  episodes = play(in_bytes, roomy, seeds, pool=pool)
  texts = (
    piece
    for episode in episodes
    for piece in tokenizer_lib.split_markup(in_bytes.text(episode.ids))
  )
  return tokenizer_lib.train(texts, vocab_size=vocab_size)
