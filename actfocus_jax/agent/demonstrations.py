"""Demonstrations: a scripted player in the policy's place."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from actfocus_jax.agent import episode as episode_lib
from actfocus_jax.agent import tokenizer as tokenizer_lib
from actfocus_jax.agent.chat import Chat


def play(
  chat: Chat, env, limits: episode_lib.Limits, player, seeds: Iterable[int]
) -> list[episode_lib.Episode]:
  """Plays one episode per seed, in the form a rollout would have.

  Args:
    chat: The tokenizer bridge.
    env: The environment.
    limits: Of every episode.
    player: Has `respond(env, state, rng) -> (thought, actions)`.
    seeds: Of the environment, and of the player's choices.

  Returns:
    Finished episodes. Their log-probs are 0: nobody sampled them.
  """
  return [_play_one(chat, env, limits, player, seed) for seed in seeds]


def _play_one(chat, env, limits, player, seed):
  rng = np.random.default_rng((seed, 1))
  opening = episode_lib.open_episode(chat, env, limits, seed)
  episode = episode_lib.Episode(chat, env, limits, opening)
  while not episode.over:
    thought, actions = player.respond(env, episode.state, rng)
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


def train_tokenizer(
  env, limits: episode_lib.Limits, player, seeds: Iterable[int], vocab_size: int
):
  """A tokenizer fit to what one environment and one player say.

  The same conversations are first written in plain bytes, so that they need
  no second renderer.

  Args:
    env: The environment.
    limits: Of every episode; its token limits are not applied.
    player: As in `play`.
    seeds: Of the conversations it is trained on.
    vocab_size: Upper limit.

  Returns:
    A transformers tokenizer.
  """
  in_bytes = Chat(tokenizer_lib.train([]))
  roomy = dataclasses.replace(limits, response_tokens=10**6, context=10**8)
  episodes = play(in_bytes, env, roomy, player, seeds)
  texts = (
    piece
    for episode in episodes
    for piece in tokenizer_lib.split_markup(in_bytes.text(episode.ids))
  )
  return tokenizer_lib.train(texts, vocab_size=vocab_size)
