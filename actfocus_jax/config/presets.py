"""Settings that several config files share: weights, sizes, built-in model."""

import ml_collections

from actfocus_jax import errors
from actfocus_jax.algorithm import estimators, signals
from actfocus_jax.config import schema

# `weights=NAME` of a config argument: changes of the section `weights`.
WEIGHTS = {
  'actfocus': dict(signal='energy', alpha=0.1, beta=0.5),
  'uniform': dict(signal='energy', alpha=1.0, beta=0.0),
  'downweight': dict(signal='energy', alpha=0.1, beta=0.0),
  **{
    name: dict(signal=name, alpha=0.1, beta=0.5)
    for name in signals.SIGNALS
    if name != 'energy'
  },
  'top_entropy': dict(scheme='top_entropy'),
}

# On the Hugging Face hub; --config.model.path names another place.
MODELS = {
  size.lower(): f'Qwen/Qwen2.5-{size}-Instruct'
  for size in ('0.5B', '1.5B', '3B', '7B')
}
# Shapes of these models, so that --dry_run needs no download.
SHAPES = {
  MODELS[size]: dict(
    vocab_size=vocab,
    hidden_size=width,
    intermediate_size=hidden,
    num_layers=layers,
    num_heads=heads,
    num_key_value_heads=keys,
    head_dim=width // heads,
    tie_word_embeddings=tied,
  )
  for size, vocab, width, hidden, layers, heads, keys, tied in (
    ('0.5b', 151_936, 896, 4864, 24, 14, 2, True),
    ('1.5b', 151_936, 1536, 8960, 28, 12, 2, True),
    ('3b', 151_936, 2048, 11_008, 36, 16, 2, True),
    ('7b', 152_064, 3584, 18_944, 28, 28, 4, False),
  )
}
# Response tokens and context of the built-in model; some environments
# need more.
_TINY = (32, 512)
_TINY_LENGTHS = dict(sokoban=(48, 768), sudoku=(32, 1536), webshop=(128, 1536))
# Micro-batch over all devices: one row on each of four devices.
MICROBATCH = 4


def arguments(arg: str | None, **free: str) -> dict[str, str]:
  """Read `size=...,algo=...,weights=...,estimator=...` of a config argument.

  `arg` is the part of `--config=FILE:...` after the colon, or None; `free` are
  defaults of further keys, which take any value. Returns a value for each key,
  without `arg` size=tiny, algo=grpo, weights=actfocus, estimator=auto.

  Raises:
    UsageError: a key or value is unknown.
  """
  allowed = dict(
    size=('tiny', *MODELS),
    algo=schema.ALGOS,
    weights=tuple(WEIGHTS),
    estimator=('auto', *estimators.ESTIMATORS),
  )
  chosen = {key: values[0] for key, values in allowed.items()} | free
  for piece in filter(None, (arg or '').split(',')):
    key, _, value = piece.partition('=')
    if key not in chosen:
      raise errors.UsageError(
        f'Config argument {key!r} is unknown; allowed: {", ".join(chosen)}.'
      )
    if key in allowed and value not in allowed[key]:
      names = ', '.join(allowed[key])
      raise errors.UsageError(
        f'Config argument {key} is {value!r}; allowed: {names}.'
      )
    chosen[key] = value
  return chosen


def apply(c: ml_collections.ConfigDict, choice: dict[str, str]):
  """Set what `arguments` returned, in place."""
  c.algo = choice['algo']
  c.weights.update(WEIGHTS[choice['weights']])
  c.advantage.estimator = choice['estimator']
  if choice['estimator'] == 'turn_gae':  # Its paper clips the turn's ratio.
    c.learner.ratio = 'turn'
  if choice['size'] == 'tiny':
    tiny(c)
  else:
    c.model.path = MODELS[choice['size']]
    c.model.remat = True
    c.learner.microbatch = MICROBATCH
    c.rollout.lengths = (1024, 2048, 3072, 3600)


def tiny(c: ml_collections.ConfigDict):
  """Set the built-in model: short answers, higher learning rates."""
  c.model.path = ''
  c.model.remat = True
  names = [section.name for section in schema.sections(c)]
  lengths = [_TINY_LENGTHS.get(name, _TINY) for name in names]
  responses, contexts = zip(*lengths, strict=True)
  c.limits.response_tokens = max(responses)
  c.limits.context = max(contexts)
  c.rollout.decode_steps = 6
  c.rollout.lengths = (c.limits.context * 3 // 4, c.limits.context)
  c.optimizer.learning_rate = 1.5e-4
  c.optimizer.warmup_steps = 5
  if c.algo == 'ppo':
    c.critic.optimizer.learning_rate = 1e-3
