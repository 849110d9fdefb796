"""Warm start: the built-in model, made once from demonstrations, then kept.

The stages of a warm start:

1. A scripted, imperfect player plays the environment and writes as the model
   should: a thought, then an answer.
2. A tokenizer is trained on these conversations.
3. A small Qwen2 learns to write and act like the player.
4. Model and tokenizer become a Hugging Face directory, which is used like one
   of Qwen2.5 from then on.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from actfocus_jax import errors
from actfocus_jax.algorithm import trajectory
from actfocus_jax.learner import state as state_lib
from actfocus_jax.model import architecture, hf, transformer
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.rollout import collector, env_pool
from actfocus_jax.rollout import episode as episode_lib
from actfocus_jax.run import interrupt, locks, progress
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.warmstart import demonstrations, supervised

# Seeds of demonstrations: far from those of training (10000 and up by the
# step) and of evaluation (123 and up).
_FIRST_SEED = 1_000_000_000
_SEEDS = 10_000_000  # number of seeds that each warm start may use
_TOKENIZER_EPISODES = 256
_LENGTH_BLOCK = 128  # conversations are padded to multiples of this
_VOCAB_BLOCK = 64  # of the vocabulary, so that devices can share it
# Raised when this file, the players or the tokenizer make another model from
# the same plan, so that cached ones are not used any more.
_VERSION = 4


@dataclasses.dataclass(frozen=True)
class WarmStart:
  """Plan of a warm start.

  Attributes:
    name: names of the environments; begins the directory's name.
    described: config sections env, limits, player and mixture as JSON values,
      for the directory's name.
    cast: (game, player that demonstrates it) pairs.
    pool: pool that runs the environments.
    learning_rate: peak of the learning rate, after a warm-up of 5 % of the
      steps; a cosine leads from it to 5 % of it.
    observation_weight: see `supervised.step`.
    seed: seed of the demonstrations, the initial weights and the batches.
    cache and all other attributes: fields of the config section warm_start.
  """

  name: str
  described: dict[str, Any]
  cast: demonstrations.Cast
  pool: env_pool.EnvPool
  cache: str
  episodes: int
  steps: int
  batch: int
  learning_rate: float
  observation_weight: float
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_key_value_heads: int
  seed: int

  @property
  def directory(self) -> pathlib.Path:
    """Directory of the warm start; its name is a hash of the plan."""
    bare = dataclasses.replace(self, cast=(), pool=None, cache='')
    key = dataclasses.asdict(bare)
    del key['pool']
    key['version'] = _VERSION
    key['instructions'] = [game.env.instructions for game, _ in self.cast]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
    return pathlib.Path(self.cache) / f'{self.name}-{digest.hexdigest()[:12]}'

  @property
  def seeds(self) -> range:
    """Seeds of the demonstrations that the model learns from."""
    first = _FIRST_SEED + self.seed * _SEEDS
    return range(first, first + self.episodes)

  @property
  def tokenizer_seeds(self) -> range:
    """Seeds of the demonstrations that the tokenizer is trained on."""
    first = self.seeds.start + _SEEDS // 2
    return range(first, first + _TOKENIZER_EPISODES)


def ensure(plan: WarmStart) -> pathlib.Path:
  """Make a warm start unless it is cached; return its directory."""
  plan.directory.parent.mkdir(parents=True, exist_ok=True)
  # Several first runs may start together: one makes it, the others wait.
  with locks.lock_file(plan.directory.with_suffix('.lock'), wait=True):
    if not plan.directory.exists():
      make(plan, plan.directory)
  return plan.directory


def tokenizer(plan: WarmStart):
  """Train the tokenizer, on demonstrations of its own."""
  return demonstrations.train_tokenizer(
    plan.cast, plan.tokenizer_seeds, plan.vocab_size, pool=plan.pool
  )


def make(plan: WarmStart, directory: pathlib.Path):
  """Play, train and write; the directory stays empty until all is done.

  Raises:
    UsageError: the limits are too tight, or the environment fails.
    Stopped: SIGINT or SIGTERM arrived.
  """
  try:
    tokens = tokenizer(plan)
    chat = chat_lib.Chat(tokens)
    played = [game for game, _ in plan.cast]
    collector.check_first_prompts(chat, played, plan.pool, plan.seeds)
    episodes = demonstrations.play(
      chat, plan.cast, plan.seeds, pool=plan.pool, report=print
    )
  except ValueError as error:
    raise errors.UsageError(str(error)) from error
  config, mesh = _model_config(plan, len(tokens)), mesh_lib.single_device_mesh()
  graphdef, params = transformer.create(
    config, mesh, jax.random.key(plan.seed), dtype=jnp.float32, remat=True
  )
  peak, warmup = plan.learning_rate, max(plan.steps // 20, 1)
  rate = optax.warmup_cosine_decay_schedule(
    peak / warmup, peak, warmup, plan.steps, peak / 20
  )
  tx = state_lib.optimizer(
    learning_rate=rate, b1=0.9, b2=0.98, weight_decay=0.01, clip_norm=1.0
  )
  state = state_lib.create_model_state(params, tx)
  solved = np.mean([episode.success for episode in episodes])
  with (
    jax.set_mesh(mesh),
    progress.Progress('warm start', plan.steps, interval=5) as display,
    interrupt.Interrupt() as stop,
  ):
    display.note(
      f'warm start: the model learns from {len(episodes)} demonstrations of a '
      f'player that solves {solved:.0%}'
    )
    batches = _batches(episodes, plan, chat.pad_id)
    for step, batch in enumerate(batches, 1):
      if stop.requested:
        raise errors.Stopped(
          f'Stopped by {stop.signal} during the warm start, which is not '
          'saved. The same command starts it again.',
          stop.code,
        )
      rows = mesh_lib.put_rows(mesh, (batch.tokens, batch.valid, batch.sampled))
      state, metrics = supervised.step(
        graphdef,
        tx,
        state,
        *rows,
        observation_weight=plan.observation_weight,
      )
      if step % 10 == 0 or step == plan.steps:
        display.update(step, loss=float(metrics['loss']))
  hf.save(directory, config, state.params, tokenizer=tokens)


def _model_config(plan: WarmStart, vocab_size: int) -> architecture.Config:
  return architecture.Config(
    vocab_size=-(-vocab_size // _VOCAB_BLOCK) * _VOCAB_BLOCK,
    hidden_size=plan.hidden_size,
    intermediate_size=plan.intermediate_size,
    num_layers=plan.num_layers,
    num_heads=plan.num_heads,
    num_key_value_heads=plan.num_key_value_heads,
    head_dim=plan.hidden_size // plan.num_heads,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
    # 0.02 suits thousands of units. A narrow model learns to copy from the
    # board several times sooner if its layers start at unit gain.
    initializer_range=plan.hidden_size**-0.5,
  )


def _batches(
  episodes: list[episode_lib.Episode], plan: WarmStart, pad: int
) -> Iterator[trajectory.Trajectory]:
  """Yield `plan.steps` batches, each of conversations of similar length."""
  buckets: dict[int, list[episode_lib.Episode]] = {}
  for episode in episodes:
    blocks = -(-len(episode.ids) // _LENGTH_BLOCK)
    buckets.setdefault(blocks * _LENGTH_BLOCK, []).append(episode)
  rows = {
    length: episode_lib.to_trajectory(
      bucket, [0] * len(bucket), length=length, pad=pad
    )
    for length, bucket in sorted(buckets.items())
  }
  lengths = list(rows)
  share = np.array([len(buckets[n]) for n in lengths]) / len(episodes)
  rng = np.random.default_rng(plan.seed)
  for _ in range(plan.steps):
    length = lengths[rng.choice(len(lengths), p=share)]
    chosen = rng.choice(len(buckets[length]), size=plan.batch)
    yield jax.tree.map(lambda x, i=chosen: x[i], rows[length])
