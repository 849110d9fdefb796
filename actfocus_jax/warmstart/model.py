"""The small default model: made once from demonstrations, then kept.

The life of a warm start:

1. A scripted, imperfect player plays the environment and talks like the model
   should: a thought, then an answer.
2. A tokenizer is trained on what was said.
3. A small Qwen2 learns to talk and act like the player.
4. Model and tokenizer become a Hugging Face directory, and everything after
   it treats that like Qwen2.5.
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
from actfocus_jax.rollout import collector, env_pool, episode
from actfocus_jax.run import interrupt, locks, progress
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.warmstart import demonstrations, supervised

# Boards of demonstrations: far from those of training (10000 and up by the
# step) and of evaluation (123 and up).
_FIRST_SEED = 1_000_000_000
_SEEDS = 10_000_000  # to each seed of a warm start
_TOKENIZER_EPISODES = 256
_LENGTH_BLOCK = 128  # conversations are padded to multiples of this
_VOCAB_BLOCK = 64  # the vocabulary too, so that it can be split over devices
# Raised when this file, the players or the tokenizer make another model from
# the same plan; else a cached one would go on being used.
_VERSION = 4


@dataclasses.dataclass(frozen=True)
class WarmStart:
  """What the small model is made from.

  Attributes:
    name: Of the environments; begins the directory's name.
    described: env, limits, player and mixture as JSON values, for the
      directory's name.
    cast: The games and who plays the demonstrations of each.
    pool: Where environments run.
    cache: The folder of all warm starts.
    episodes: Demonstrations.
    steps: Optimizer steps.
    batch: Conversations a step.
    learning_rate: At its peak; a warm-up of 5 % and a cosine to 5 % of it.
    observation_weight: As of learner.supervised.step.
    vocab_size: Of the tokenizer, without set phrases.
    hidden_size: Width; this and the rest as in model.architecture.Config.
    intermediate_size: Width of its MLP.
    num_layers: Its depth.
    num_heads: Query heads.
    num_key_value_heads: Key heads.
    seed: Of demonstrations, initial weights and batches.
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
    """Where it is kept; whatever changes the model changes the name."""
    bare = dataclasses.replace(self, cast=(), pool=None, cache='')
    own = dataclasses.asdict(bare)
    del own['pool']
    own['version'] = _VERSION
    own['instructions'] = [game.env.instructions for game, _ in self.cast]
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    return pathlib.Path(self.cache) / f'{self.name}-{digest.hexdigest()[:12]}'

  @property
  def first_seed(self) -> int:
    """The first board of the demonstrations."""
    return _FIRST_SEED + self.seed * _SEEDS


def ensure(plan: WarmStart) -> pathlib.Path:
  """Makes the warm start unless it is there.

  Args:
    plan: What it is made from.

  Returns:
    Its Hugging Face directory.
  """
  plan.directory.parent.mkdir(parents=True, exist_ok=True)
  # Several first runs may start at once: one makes it, the others wait.
  with locks.lock_file(plan.directory.with_suffix('.lock'), wait=True):
    if not plan.directory.exists():
      make(plan, plan.directory)
  return plan.directory


def tokenizer(plan: WarmStart):
  """The tokenizer, trained on demonstrations of its own."""
  first = plan.first_seed + _SEEDS // 2
  return demonstrations.train_tokenizer(
    plan.cast,
    range(first, first + _TOKENIZER_EPISODES),
    plan.vocab_size,
    pool=plan.pool,
  )


def make(plan: WarmStart, directory: pathlib.Path):
  """Plays, trains and writes; nothing stands in the directory until it is done.

  Args:
    plan: What it is made from.
    directory: New or empty.

  Raises:
    Stopped: After SIGINT or SIGTERM.
  """
  seeds = range(plan.first_seed, plan.first_seed + plan.episodes)
  try:
    made = tokenizer(plan)
    chat = chat_lib.Chat(made)
    played = [game for game, _ in plan.cast]
    collector.check_first_prompts(chat, played, plan.pool, seeds)
    episodes = demonstrations.play(
      chat, plan.cast, seeds, pool=plan.pool, tell=print
    )
  except ValueError as error:  # Limits too tight, an environment that fails.
    raise errors.UsageError(str(error)) from error
  config, mesh = _model_config(plan, len(made)), mesh_lib.single_device_mesh()
  graphdef, params = transformer.create(
    config, mesh, jax.random.key(plan.seed), dtype=jnp.float32, remat=True
  )
  tx = _optimizer(plan)
  state = state_lib.trained(params, tx)
  solved = np.mean([one.success for one in episodes])
  with (
    jax.set_mesh(mesh),
    progress.Progress('warm start', plan.steps, interval=5) as display,
    interrupt.Interrupt() as stop,
  ):
    display.note(
      f'warm start: a small model learns from {len(episodes)} demonstrations '
      f'of a player that solves {solved:.0%}'
    )
    batches = _batches(episodes, plan, chat.pad_id)
    for step, batch in enumerate(batches, 1):
      if stop.requested:
        raise errors.Stopped(
          f'Stopped by {stop.signal} during the warm start, of which nothing '
          'is kept. The same command starts it again.',
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
  hf.save(directory, config, state.params, tokenizer=made)


def _optimizer(plan: WarmStart) -> optax.GradientTransformation:
  peak, warmup = plan.learning_rate, max(plan.steps // 20, 1)
  rate = optax.warmup_cosine_decay_schedule(
    peak / warmup, peak, warmup, plan.steps, peak / 20
  )
  return state_lib.optimizer(
    learning_rate=rate, b1=0.9, b2=0.98, weight_decay=0.01, clip_norm=1.0
  )


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
    # 0.02 suits thousands of units; a narrow model learns to copy from the
    # board several times sooner when its layers start at unit gain.
    initializer_range=plan.hidden_size**-0.5,
  )


def _batches(
  episodes: list[episode.Episode], plan: WarmStart, pad: int
) -> Iterator[trajectory.Trajectory]:
  """`plan.steps` batches, each of conversations of similar length."""
  buckets: dict[int, list[episode.Episode]] = {}
  for one in episodes:
    blocks = -(-len(one.ids) // _LENGTH_BLOCK)
    buckets.setdefault(blocks * _LENGTH_BLOCK, []).append(one)
  rows = {
    length: episode.to_trajectory(
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
