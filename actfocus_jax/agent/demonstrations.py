"""Demonstrations: a scripted player in the policy's place."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from actfocus_jax.agent import episode as episode_lib
from actfocus_jax.agent import games
from actfocus_jax.agent import tokenizer as tokenizer_lib
from actfocus_jax.agent.chat import Chat

# Who plays what: a player has `respond(env, state, rng) -> (thought, actions)`.
Cast = Sequence[tuple[games.Game, Any]]


def play(
  chat: Chat, cast: Cast, seeds: Iterable[int]
) -> list[episode_lib.Episode]:
  """Plays one episode per seed, in the form a rollout would have.

  Args:
    chat: The tokenizer bridge.
    cast: Games and their players; a seed says which.
    seeds: Of the environment, and of the player's choices.

  Returns:
    Finished episodes. Their log-probs are 0: nobody sampled them.
  """
  players = {game.name: player for game, player in cast}
  played = [game for game, _ in cast]
  episodes = []
  for seed in seeds:
    game = games.pick(played, seed)
    episodes.append(_play_one(chat, game, players[game.name], seed))
  return episodes


def _play_one(chat, game: games.Game, player, seed: int):
  rng = np.random.default_rng((seed, 1))
  limits = game.limits
  opening = episode_lib.open_episode(chat, game, seed)
  episode = episode_lib.Episode(chat, opening)
  while not episode.over:
    thought, actions = player.respond(game.env, episode.state, rng)
    ids = chat.respond(thought, actions)
    if len(ids) > limits.response_tokens:
      raise ValueError(
        f'limits.response_tokens is {limits.response_tokens}, but a '
        f'demonstrated response has {len(ids)} tokens; allowed: that or more.'
      )
    if len(ids) > episode.token_budget:  # The context ends here.
      break
    episode.respond(ids, [0.0] * len(ids))
  return episode


def train_tokenizer(cast: Cast, seeds: Iterable[int], vocab_size: int):
  """A tokenizer fit to what some environments and their players say.

  The same conversations are first written in plain bytes, so that they need
  no second renderer.

  Args:
    cast: As in `play`; token limits are not applied.
    seeds: Of the conversations it is trained on.
    vocab_size: Upper limit.

  Returns:
    A transformers tokenizer.
  """
  in_bytes = Chat(tokenizer_lib.train([]))
  episodes = play(in_bytes, [(_roomy(g), player) for g, player in cast], seeds)
  texts = (
    piece
    for episode in episodes
    for piece in tokenizer_lib.split_markup(in_bytes.text(episode.ids))
  )
  return tokenizer_lib.train(texts, vocab_size=vocab_size)


def _roomy(game: games.Game) -> games.Game:
  limits = dataclasses.replace(
    game.limits, response_tokens=10**6, context=10**8
  )
  return dataclasses.replace(game, limits=limits)
