"""A tiny policy that can hold a conversation, and a rollout of it.

Random weights almost never write an answer, so the embedding and the head are
set to a table of likely next tokens. The layers between stay random and strong
enough that every log-probability depends on all tokens before it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from actfocus_jax.envs import frozen_lake
from actfocus_jax.model import architecture, transformer
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.rollout import collector as collector_lib
from actfocus_jax.rollout import episode, games
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.warmstart import demonstrations, players

LIMITS = games.Limits(
  turns=3, max_actions=2, action_budget=5, response_tokens=11, context=236
)
LENGTH = 240
SEEDS = (3, 4, 5)
MEMBERS = 4

_MOVES = dict.fromkeys(('Left', 'Down', 'Right', 'Up'), 8.0)
# Logits of likely next tokens, above those of all others.
_FOLLOWS = {
  '<think>': {'</think>': 7.5},
  '</think>': {'<answer>': 10.0},
  '<answer>': _MOVES,
  **dict.fromkeys(_MOVES, {' || ': 9.0, '</answer>': 10.0}),
  ' || ': _MOVES,
  '</answer>': {'<|im_end|>': 10.0},
  None: {'</think>': 6.5, '<|im_end|>': 3.5},
}


@pytest.fixture(scope='package')
def limits():
  """So tight that the context ends some of the episodes."""
  return LIMITS


@pytest.fixture(scope='package')
def lake():
  return frozen_lake.FrozenLake(
    instructions='P walks to G (√), not into O (X).'
  )


@pytest.fixture(scope='package')
def tokenizer(lake):
  return demonstrations.train_tokenizer(
    [
      (
        games.Game('lake', lake, LIMITS),
        players.frozen_lake.FrozenLakeCareless(),
      )
    ],
    range(80),
    vocab_size=560,
  )


@pytest.fixture(scope='package')
def chat(tokenizer):
  return chat_lib.Chat(tokenizer)


@pytest.fixture(scope='package')
def policy(tokenizer):
  config = architecture.Config(
    vocab_size=len(tokenizer),
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rope_theta=100.0,
    tie_word_embeddings=False,
  )
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  graphdef, params = transformer.create(
    config, mesh, jax.random.key(0), dtype=jnp.float32
  )
  params = jax.tree_util.tree_map_with_path(_noisy, params)
  embedding_VD, head_DV = _tables(tokenizer, config)
  params['embedding'][...], params['head'][...] = embedding_VD, head_DV
  return collector_lib.Policy(config, graphdef, params, jnp.float32)


def _noisy(path, leaf):
  name = mesh_lib.path_name(path)
  key = jax.random.fold_in(jax.random.key(7), sum(map(ord, name)))
  return leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)


def _tables(tokenizer, config):
  shape = (config.vocab_size, config.hidden_size)
  embedding_VD = 0.3 * jax.random.normal(jax.random.key(1), shape)
  head_DV = 0.05 * jax.random.normal(jax.random.key(2), shape[::-1])
  row_of = {name: row for row, name in enumerate(_FOLLOWS)}
  for index in range(config.vocab_size):
    row = row_of.get(tokenizer.decode([index]), row_of[None])
    embedding_VD = embedding_VD.at[index, row].add(2.0)
  for name, followers in _FOLLOWS.items():
    for follower, logit in followers.items():
      (index,) = tokenizer.encode(follower, add_special_tokens=False)
      # The last norm makes about 4 of the 2.0 above.
      head_DV = head_DV.at[row_of[name], index].add(logit / 3.5)
  return embedding_VD, head_DV


@pytest.fixture(scope='package')
def collect(chat, lake, policy):
  """Plays `MEMBERS` episodes on each of `SEEDS`; keywords change one thing."""

  def run(
    *,
    seeds=SEEDS,
    members=MEMBERS,
    key=0,
    temperature=1.0,
    devices=1,
    limits=LIMITS,
    played=None,
    **shapes,
  ):
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:devices])
    where = mesh_lib.param_shardings(
      mesh, transformer.PARTITION_RULES, policy.params
    )
    placed = dataclasses.replace(
      policy, params=jax.device_put(policy.params, where)
    )
    played = played or (games.Game('lake', lake, limits),)
    collector = collector_lib.Collector(chat, played, mesh, **shapes)
    with jax.set_mesh(mesh):
      return collector.collect(
        placed,
        seeds,
        jax.random.key(key),
        members=members,
        temperature=temperature,
      )

  return run


@pytest.fixture(scope='package')
def pad(chat):
  """Returns the episodes of a rollout as a padded batch."""

  def run(played):
    return episode.to_trajectory(
      played.episodes, played.groups, length=LENGTH, pad=chat.pad_id
    )

  return run


@pytest.fixture(scope='package')
def played(collect):
  """The rollout that most tests use."""
  return collect()


@pytest.fixture(scope='package')
def batch(played, pad):
  """The same rollout as a padded batch."""
  return pad(played)
