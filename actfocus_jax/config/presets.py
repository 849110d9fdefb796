"""Settings that several config files share: sizes, and the small model's."""

import ml_collections

from actfocus_jax.config import env_schema, schema

# On the Hugging Face hub; --config.model.path names another place.
MODELS = {
  '0.5b': 'Qwen/Qwen2.5-0.5B-Instruct',
  '1.5b': 'Qwen/Qwen2.5-1.5B-Instruct',
  '3b': 'Qwen/Qwen2.5-3B-Instruct',
  '7b': 'Qwen/Qwen2.5-7B-Instruct',
}
# Their config.json, so that --dry_run needs no download.
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
# Response tokens and context of the small model where it needs more than _TINY.
_TINY = (32, 512)
_TINY_LENGTHS = {
  'sokoban': (48, 768),
  'sudoku': (32, 1536),
  'webshop': (128, 1536),
}
# Rows of 3600 tokens in one backward pass, over all devices: one for each of 4.
MICROBATCH = 4


def arguments(arg: str | None, **free: str) -> dict[str, str]:
  """Reads `size=...,algo=...,weights=...` of a config argument.

  Args:
    arg: What stands after the colon of `--config=FILE:...`.
    **free: Other keys, with their defaults, that take any value.

  Returns:
    A value for each of size, algo, weights and estimator (the field
    `advantage.estimator`); the defaults are tiny, grpo, actfocus, auto. And
    one for each free key.

  Raises:
    UsageError: For an unknown key or value.
  """
  others = (name for name in schema.WEIGHTS if name != 'actfocus')
  return schema.parse_argument(
    arg,
    size=('tiny', *MODELS),
    algo=schema.ALGOS,
    weights=('actfocus', *others),
    estimator=('auto', *schema.ESTIMATORS),
    free=free,
  )


def apply(c: ml_collections.ConfigDict, choice: dict[str, str]):
  """Sets what `arguments` chose.

  Args:
    c: The config; changed in place.
    choice: From `arguments`.
  """
  c.algo = choice['algo']
  c.weights.update(schema.WEIGHTS[choice['weights']])
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
  """The embedded default: a small model, short answers, a higher rate.

  Args:
    c: The config; changed in place.
  """
  c.model.path = ''
  c.model.remat = True
  responses, contexts = zip(
    *(_TINY_LENGTHS.get(s.name, _TINY) for s in env_schema.sections(c)),
    strict=True,
  )
  c.limits.response_tokens = max(responses)
  c.limits.context = max(contexts)
  c.rollout.decode_steps = 6
  c.rollout.lengths = (c.limits.context * 3 // 4, c.limits.context)
  c.optimizer.learning_rate = 1.5e-4
  c.optimizer.warmup_steps = 5
  if c.algo == 'ppo':
    c.critic.optimizer.learning_rate = 1e-3
