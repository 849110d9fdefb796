"""The config: every field with its default, its meaning and what it allows.

`defaults()` is the whole schema; the files in configs/ start from it and
change numbers. Most sections are the keyword arguments of one consumer, which
is named beside them. `check` refuses a bad value with one sentence. Nothing
here imports jax, so that a mistake is told at once.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections

ENVS = ('frozen_lake', 'sokoban')
ALGOS = ('grpo',)
SIGNALS = ('energy', 'entropy', 'nll', 'logprob_shift', 'random')

# `weights=NAME` in a config argument: which signal, and its alpha and beta.
WEIGHTS = {
  'uniform': dict(signal='energy', alpha=1.0, beta=0.0),
  'actfocus': dict(signal='energy', alpha=0.1, beta=0.5),
  'downweight': dict(signal='energy', alpha=0.1, beta=0.0),
  'entropy': dict(signal='entropy', alpha=0.1, beta=0.5),
  'nll': dict(signal='nll', alpha=0.1, beta=0.5),
  'logprob_shift': dict(signal='logprob_shift', alpha=0.1, beta=0.5),
  'random': dict(signal='random', alpha=0.1, beta=0.5),
}


def defaults() -> ml_collections.ConfigDict:
  """The schema, with the paper's values (method of arXiv 2605.14558).

  Returns:
    A ConfigDict whose fields are all there are. Config files change values
    and lock it; a field that is not here cannot be set.
  """
  c = ml_collections.ConfigDict()
  c.seed = 0  # names every random number of the run
  c.num_steps = 200
  c.algo = 'grpo'

  # The keyword arguments of envs.ENVS[name], in env.options.
  c.env = dict(name='frozen_lake', options=ml_collections.ConfigDict())

  # path: a Hugging Face directory, or '' to make the small model of
  # `warm_start`. dtype of the computation: auto is bfloat16 on accelerators
  # and float32 on CPU; master weights are float32.
  c.model = dict(path='', dtype='auto', remat=False)

  # The keyword arguments of agent.episode.Limits.
  c.limits = dict(
    turns=5,
    max_actions=2,
    action_budget=10,
    response_tokens=400,
    context=3600,
    format_penalty=-0.1,
  )

  # prompts x members episodes a step; the rest shapes the work on the device
  # (agent.rollout.Collector). slots: episodes at a time, 0 for all. lengths:
  # the batch is right-padded to the first that suffices; () is context.
  c.rollout = dict(
    prompts=8,
    members=16,
    temperature=1.0,
    slots=128,
    decode_steps=8,
    observation_block=32,
    cache_block=128,
    lengths=(),
  )

  # learner.step.Algorithm: one section per stage.
  c.selection = dict(ratio=1.0)
  c.weights = dict(WEIGHTS['actfocus'])
  c.advantage = dict(normalize_std=True)
  c.loss = dict(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
  c.entropy_coefficient = 0.001

  # minibatch: trajectories an optimizer step; microbatch: trajectories a
  # forward and backward pass (0: the minibatch). old_logprob: the sampler's
  # own log-probs, or those of a fresh forward pass. fused: one program for
  # scoring and update, or two that time apart.
  c.learner = dict(
    minibatch=32,
    microbatch=0,
    epochs=1,
    old_logprob='rescore',
    fused=True,
    score_chunk=512,
  )

  # learner.state.optimizer: AdamW with clipping by global norm.
  c.optimizer = dict(
    learning_rate=1e-6,
    warmup_steps=0,
    b1=0.9,
    b2=0.999,
    weight_decay=0.01,
    clip_norm=1.0,
  )

  # Held-out boards: seeds first_seed, first_seed + 1, ...; every=0 evaluates
  # before and after training only. save: trajectories written for the viewer.
  c.eval = dict(
    every=10,
    prompts=32,
    members=16,
    temperature=0.5,
    first_seed=123,
    save=16,
  )

  c.checkpoint = dict(every=10, keep=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)  # model.mesh.make_mesh

  # The scripted player of the demonstrations: envs.players.PLAYERS[env][name],
  # its fields replaced by player.options.
  c.player = dict(name='careless', options=ml_collections.ConfigDict())

  # The keyword arguments of base_model.WarmStart: the small default model,
  # made once for each content of env, limits, player and this section, and
  # kept in `cache`.
  c.warm_start = dict(
    cache='runs/warm_starts',
    episodes=2048,
    steps=300,
    batch=32,
    learning_rate=4e-3,
    vocab_size=768,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=1,
    seed=0,
  )
  return c


def parse_argument(
  text: str | None, **allowed: Sequence[str]
) -> dict[str, str]:
  """Reads the part of `--config=FILE:key=value,...` after the colon.

  Args:
    text: That part, or None.
    **allowed: The values of each key; the first is the default.

  Returns:
    One value for every key.

  Raises:
    ValueError: For an unknown key or value.
  """
  chosen = {key: values[0] for key, values in allowed.items()}
  for piece in filter(None, (text or '').split(',')):
    key, _, value = piece.partition('=')
    if key not in allowed:
      raise ValueError(
        f'Config argument {key!r} is unknown; allowed: {", ".join(allowed)}.'
      )
    if value not in allowed[key]:
      raise ValueError(
        f'Config argument {key} is {value!r}; allowed: '
        f'{", ".join(allowed[key])}.'
      )
    chosen[key] = value
  return chosen


# --- What each field allows --------------------------------------------------


class _Rule(NamedTuple):
  field: str
  holds: Callable[[Any], bool]
  allowed: str


def _at_least(low: float, *fields: str) -> list[_Rule]:
  return [_Rule(f, lambda x: x >= low, f'{low:g} or more') for f in fields]


def _above(low: float, *fields: str) -> list[_Rule]:
  return [_Rule(f, lambda x: x > low, f'above {low:g}') for f in fields]


def _within(low: float, high: float, *fields: str) -> list[_Rule]:
  text = f'{low:g} to {high:g}'
  return [_Rule(f, lambda x: low <= x <= high, text) for f in fields]


def _one_of(values: Sequence[str], *fields: str) -> list[_Rule]:
  text = f'one of {", ".join(values)}'
  return [_Rule(f, lambda x: x in values, text) for f in fields]


_RULES = [
  *_one_of(ENVS, 'env.name'),
  *_one_of(ALGOS, 'algo'),
  *_one_of(SIGNALS, 'weights.signal'),
  *_one_of(('auto', 'float32', 'bfloat16'), 'model.dtype'),
  *_one_of(('sampler', 'rescore'), 'learner.old_logprob'),
  *_within(0, 1, 'weights.alpha'),
  *_at_least(0, 'weights.beta'),
  *_at_least(0, 'seed', 'num_steps', 'rollout.slots', 'learner.microbatch'),
  *_at_least(0, 'entropy_coefficient', 'eval.every', 'eval.save'),
  *_at_least(0, 'optimizer.warmup_steps', 'optimizer.weight_decay'),
  *_at_least(0, 'eval.first_seed', 'warm_start.seed'),
  *_at_least(1, 'limits.turns', 'limits.max_actions', 'limits.action_budget'),
  *_at_least(1, 'limits.response_tokens', 'limits.context'),
  *_within(-100, 0, 'limits.format_penalty'),
  *_at_least(1, 'rollout.prompts', 'rollout.members', 'rollout.decode_steps'),
  *_at_least(1, 'rollout.observation_block', 'rollout.cache_block'),
  *_above(0, 'rollout.temperature', 'eval.temperature'),
  *_above(0, 'optimizer.learning_rate', 'optimizer.clip_norm'),
  *_within(0, 0.999999, 'optimizer.b1', 'optimizer.b2'),
  *_within(0, 1, 'loss.clip_low'),
  *_at_least(0, 'loss.clip_high'),
  _Rule('loss.dual_clip', lambda x: x is None or x > 1, 'None or above 1'),
  _Rule('selection.ratio', lambda x: 0 < x <= 1, 'above 0, at most 1'),
  *_at_least(1, 'learner.minibatch', 'learner.epochs', 'learner.score_chunk'),
  *_at_least(1, 'eval.prompts', 'eval.members'),
  *_at_least(1, 'checkpoint.every', 'checkpoint.keep'),
  *_at_least(1, 'warm_start.episodes', 'warm_start.steps', 'warm_start.batch'),
  *_at_least(260, 'warm_start.vocab_size'),
  *_at_least(1, 'mesh.fsdp', 'mesh.tensor'),
  _Rule('mesh.data', lambda x: x == -1 or x >= 1, '-1 (the rest) or 1 or more'),
]


def check(c: ml_collections.ConfigDict):
  """Refuses values that cannot work, before anything is made.

  Args:
    c: The config.

  Raises:
    ValueError: One sentence: the field, its value, what is allowed.
  """
  for field, value in flatten(c).items():
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f'{field} is {value}; allowed: a finite number.')
  for rule in _RULES:
    value = get(c, rule.field)
    if not rule.holds(value):
      raise ValueError(f'{rule.field} is {value!r}; allowed: {rule.allowed}.')
  if c.algo == 'grpo' and c.rollout.members < 2:
    raise ValueError(
      f'rollout.members is {c.rollout.members}, but GRPO compares the members '
      'of a group with each other; allowed: 2 or more.'
    )
  _check_batches(c)
  _check_lengths(c)
  if c.mesh.data > 0:  # Else it follows from the machine; see check_mesh.
    check_mesh(c, c.mesh.data * c.mesh.fsdp)


def _check_batches(c: ml_collections.ConfigDict):
  kept = kept_rows(c)
  _divides('learner.minibatch', c.learner.minibatch, kept, 'kept trajectories')
  if c.learner.microbatch:
    _divides(
      'learner.microbatch',
      c.learner.microbatch,
      c.learner.minibatch,
      'trajectories of learner.minibatch',
    )


def _divides(field: str, value: int, whole: int, what: str):
  if whole % value:
    allowed = [str(n) for n in range(1, whole + 1) if whole % n == 0]
    raise ValueError(
      f'{field} is {value}, which does not divide the {whole} {what}; '
      f'allowed: {", ".join(allowed)}.'
    )


def _check_lengths(c: ml_collections.ConfigDict):
  lengths, context = tuple(c.rollout.lengths), c.limits.context
  if lengths and (list(lengths) != sorted(lengths) or lengths[-1] < context):
    raise ValueError(
      f'rollout.lengths is {lengths}; allowed: rising numbers of which the '
      f'last is at least limits.context, {context}.'
    )


def check_mesh(c: ml_collections.ConfigDict, shards: int):
  """Refuses batches that the mesh cannot split.

  Args:
    c: The config.
    shards: Devices along the mesh's data and fsdp axes.

  Raises:
    ValueError: One sentence.
  """
  sizes = {
    'rollout.prompts': c.rollout.prompts,
    'eval.prompts': c.eval.prompts,
    'learner.minibatch': c.learner.minibatch,
    'learner.microbatch': c.learner.microbatch or c.learner.minibatch,
  }
  for field, size in sizes.items():
    if size % shards:
      raise ValueError(
        f'{field} is {size}, which the {shards} devices of the mesh axes data '
        f'and fsdp cannot share equally; allowed: multiples of {shards}.'
      )


def kept_rows(c: ml_collections.ConfigDict) -> int:
  """Trajectories that group selection leaves for training."""
  # The small amount forgives 0.1 * 30 being 3.0000000000000004.
  kept = math.ceil(c.selection.ratio * c.rollout.prompts - 1e-9)
  return kept * c.rollout.members


# --- Fields by their dotted names --------------------------------------------


def flatten(c, prefix: str = '') -> dict[str, Any]:
  """All leaf fields by dotted name; tuples count as leaves."""
  flat = {}
  for key in c:
    value = c[key]
    if isinstance(value, (ml_collections.ConfigDict, dict)):
      flat.update(flatten(value, f'{prefix}{key}.'))
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def get(c: ml_collections.ConfigDict, field: str):
  """The value of a dotted name."""
  for name in field.split('.'):
    c = c[name]
  return c


def nearest(c: ml_collections.ConfigDict, field: str) -> list[str]:
  """Existing fields that look like `field`, best first."""
  return difflib.get_close_matches(field, list(flatten(c)), n=3, cutoff=0.5)


def to_json(c: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as plain, sorted JSON values."""
  return {
    key: list(value) if isinstance(value, tuple) else value
    for key, value in sorted(flatten(c).items())
  }


def from_json(flat: dict[str, Any]) -> ml_collections.ConfigDict:
  """The config that `to_json` wrote down.

  Args:
    flat: Values by dotted name.

  Returns:
    The config, locked.

  Raises:
    ValueError: For a field that this version does not have.
  """
  c = defaults()
  known = flatten(c)
  for field, value in flat.items():
    section, _, name = field.rpartition('.')
    if field not in known and not section.endswith('options'):
      raise ValueError(f'config.json has {field}, which is no field.')
    parent = get(c, section) if section else c
    parent[name] = tuple(value) if isinstance(value, list) else value
  return c.lock()


# What may change when a run is continued in its workdir.
_CONTINUABLE = ('num_steps', 'eval.every', 'eval.save', 'checkpoint.', 'mesh.')


def difference(old: dict[str, Any], c: ml_collections.ConfigDict) -> str | None:
  """The first field that makes `c` another experiment than `old`.

  Args:
    old: `to_json` of the run's first config.
    c: The config now.

  Returns:
    `field: old value, new value` as a phrase, or None when a run of `old` can
    go on with `c`.
  """
  new = to_json(c)
  for field in sorted(old.keys() | new.keys()):
    if field.startswith(_CONTINUABLE):
      continue
    if old.get(field) != new.get(field):
      was, now = old.get(field, 'absent'), new.get(field, 'absent')
      return f'{field} was {was!r} and is now {now!r}'
  return None
