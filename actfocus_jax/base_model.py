"""The small default model: made once from demonstrations, then kept.

No pretrained weights are needed: a scripted, imperfect player plays the
environment, a tokenizer is trained on what was said, and a small Qwen2 learns
to talk and act like the player. What comes out is a Hugging Face directory,
and everything after it treats it like Qwen2.5.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from actfocus_jax import assemble
from actfocus_jax.agent import chat as chat_lib
from actfocus_jax.agent import demonstrations, episode
from actfocus_jax.algorithm import trajectory
from actfocus_jax.learner import state as state_lib
from actfocus_jax.learner import supervised
from actfocus_jax.model import hf, qwen2
from actfocus_jax.model import mesh as mesh_lib
from actfocus_jax.run import progress, settings

# Boards of demonstrations: far from those of training (10000 and up by the
# step) and of evaluation (123 and up).
_FIRST_SEED = 1_000_000_000
_TOKENIZER_EPISODES = 256


def ensure(c: ml_collections.ConfigDict, mesh) -> pathlib.Path:
  """The directory to start from: `model.path`, or the cached warm start.

  Args:
    c: The config.
    mesh: Where the warm start is trained.

  Returns:
    A Hugging Face directory.
  """
  if c.model.path:
    return pathlib.Path(c.model.path)
  path = cached_path(c)
  if not (path / 'config.json').exists():
    make(c, mesh, path)
  return path


def cached_path(c: ml_collections.ConfigDict) -> pathlib.Path:
  """Where the warm start of this config is kept; other content, other name."""
  content = {
    'env': settings.to_json(c.env),
    'limits': settings.to_json(c.limits),
    'warm_start': settings.to_json(c.warm_start),
  }
  del content['warm_start']['cache']
  digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
  return pathlib.Path(c.warm_start.cache) / (
    f'{c.env.name}-{digest.hexdigest()[:12]}'
  )


def tokenizer(c: ml_collections.ConfigDict):
  """The tokenizer of the warm start, trained on demonstrations."""
  w = c.warm_start
  first = _FIRST_SEED + w.seed * 10_000_000 + 5_000_000
  return demonstrations.train_tokenizer(
    assemble.environment(c),
    assemble.limits(c),
    assemble.player(c),
    range(first, first + _TOKENIZER_EPISODES),
    w.vocab_size,
  )


def make(c: ml_collections.ConfigDict, mesh, path: pathlib.Path):
  """Plays, trains and writes the directory; nothing is there until it is.

  Args:
    c: The config; only env, limits and warm_start are read.
    mesh: Where it is trained.
    path: The directory to write.
  """
  w = c.warm_start
  made = tokenizer(c)
  chat = chat_lib.Chat(made)
  first = _FIRST_SEED + w.seed * 10_000_000
  episodes = demonstrations.play(
    chat,
    assemble.environment(c),
    assemble.limits(c),
    assemble.player(c),
    range(first, first + w.episodes),
  )
  config = _model_config(w, len(made))
  graphdef, params = qwen2.create(
    config, mesh, jax.random.key(w.seed), dtype=jnp.float32
  )
  rate = optax.warmup_cosine_decay_schedule(
    0.0, w.learning_rate, max(w.steps // 20, 1), w.steps, w.learning_rate / 20
  )
  tx = state_lib.optimizer(
    learning_rate=rate, b1=0.9, b2=0.98, weight_decay=0.01, clip_norm=1.0
  )
  state = state_lib.create(params, tx)
  solved = np.mean([e.success for e in episodes])
  with progress.Progress('warm start', w.steps, interval=5) as display:
    display.note(
      f'warm start: {w.episodes} demonstrations by a {w.player} player that '
      f'solves {solved:.0%}; learning to talk and act like it'
    )
    for step, batch in enumerate(_batches(episodes, c, chat.pad_id)):
      rows = mesh_lib.put_rows(mesh, (batch.tokens, batch.valid, batch.sampled))
      state, metrics = supervised.step(graphdef, tx, state, *rows)
      if step % 10 == 9 or step + 1 == w.steps:
        display.update(step + 1, loss=float(metrics['loss']))
  hf.save(path, config, state.params, tokenizer=made)


def _model_config(w, vocab_size: int) -> qwen2.Config:
  return qwen2.Config(
    vocab_size=vocab_size,
    hidden_size=w.hidden_size,
    intermediate_size=w.intermediate_size,
    num_layers=w.num_layers,
    num_heads=w.num_heads,
    num_key_value_heads=w.num_key_value_heads,
    head_dim=w.hidden_size // w.num_heads,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
  )


def _batches(
  episodes: list[episode.Episode], c: ml_collections.ConfigDict, pad: int
) -> Iterator[trajectory.Trajectory]:
  """`warm_start.steps` batches of episodes of similar length."""
  w = c.warm_start
  block = c.rollout.cache_block
  buckets: dict[int, list[episode.Episode]] = {}
  for one in episodes:
    buckets.setdefault(-(-len(one.ids) // block) * block, []).append(one)
  lengths = sorted(buckets)
  batches = {
    n: episode.to_trajectory(
      buckets[n], [0] * len(buckets[n]), length=n, pad=pad
    )
    for n in lengths
  }
  share = np.array([len(buckets[n]) for n in lengths]) / len(episodes)
  rng = np.random.default_rng(w.seed)
  for _ in range(w.steps):
    n = lengths[rng.choice(len(lengths), p=share)]
    rows = rng.choice(len(buckets[n]), size=w.batch)
    yield jax.tree.map(lambda x, rows=rows: x[rows], batches[n])
