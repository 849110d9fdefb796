"""What each config field allows; a bad value is refused with one sentence."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections

from actfocus_jax import errors
from actfocus_jax.config import env_validate, schema


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


def _unless_none(rules: list[_Rule]) -> list[_Rule]:
  return [
    _Rule(
      rule.field,
      lambda x, holds=rule.holds: x is None or holds(x),
      f'None or {rule.allowed}',
    )
    for rule in rules
  ]


def _optimizer(section: str) -> list[_Rule]:
  return [
    *_above(0, f'{section}.learning_rate', f'{section}.clip_norm'),
    *_at_least(0, f'{section}.warmup_steps', f'{section}.weight_decay'),
    *_within(0, 0.999999, f'{section}.b1', f'{section}.b2'),
  ]


def _one_of(values: Sequence[str], *fields: str) -> list[_Rule]:
  text = f'one of {", ".join(values)}'
  return [_Rule(f, lambda x: x in values, text) for f in fields]


_RULES = [
  *_one_of(schema.ALGOS, 'algo'),
  *_one_of(schema.SIGNALS, 'weights.signal'),
  *_one_of(('auto', 'float32', 'bfloat16'), 'model.dtype'),
  *_one_of(schema.RENDERINGS, 'model.rendering'),
  *_one_of(schema.ATTENTIONS, 'model.attention'),
  *_one_of(('action', 'top_entropy'), 'weights.scheme'),
  *_one_of(('auto', *schema.ESTIMATORS), 'advantage.estimator'),
  *_one_of(('final', 'turn'), 'advantage.gae.reward_placement'),
  *_one_of(('top_k', 'top_p'), 'selection.rule'),
  *_one_of(
    ('weighted_token_mean', 'sequence_mean_token_mean'), 'loss.reduction'
  ),
  *_one_of(('k1', 'k2', 'k3'), 'kl.estimator'),
  *_one_of(('token', 'turn'), 'learner.ratio'),
  *_one_of(('sampler', 'rescore'), 'learner.old_logprob'),
  *_within(0, 1, 'weights.alpha'),
  *_at_least(0, 'weights.beta', 'weights.schedule_steps'),
  *_unless_none(_within(0, 1, 'weights.alpha_end')),
  *_unless_none(_at_least(0, 'weights.beta_end')),
  *_unless_none(_above(0, 'learner.importance_cap')),
  _Rule('weights.share', lambda x: 0 < x <= 1, 'above 0, at most 1'),
  *_within(0, 1, 'advantage.gae.discount', 'advantage.gae.lam'),
  *_within(0, 1, 'advantage.turn_gae.discount', 'advantage.turn_gae.lam'),
  *_within(0, 1, 'advantage.gigpo.discount'),
  *_at_least(0, 'advantage.gigpo.step_weight', 'advantage.empg.scale'),
  *_at_least(0, 'advantage.empg.clarity_scale', 'advantage.empg.clarity_bonus'),
  *_at_least(0, 'kl.coefficient', 'critic.warmup'),
  *_at_least(1, 'selection.patience'),
  *_above(0, 'critic.clip'),
  *_at_least(0, 'seed', 'num_steps', 'rollout.slots', 'learner.microbatch'),
  *_at_least(0, 'entropy_coefficient', 'eval.every', 'eval.save'),
  *_at_least(0, 'eval.first_seed', 'warm_start.seed', 'env.threads'),
  *_at_least(1, 'limits.response_tokens', 'limits.context'),
  *_within(-100, 0, 'limits.format_penalty'),
  *_at_least(1, 'rollout.prompts', 'rollout.members', 'rollout.decode_steps'),
  *_at_least(1, 'rollout.observation_block', 'rollout.cache_block'),
  *_above(0, 'rollout.temperature', 'eval.temperature'),
  *_optimizer('optimizer'),
  *_optimizer('critic.optimizer'),
  *_above(0, 'warm_start.learning_rate'),
  *_at_least(0, 'warm_start.observation_weight'),
  *_at_least(1, 'warm_start.hidden_size', 'warm_start.intermediate_size'),
  *_at_least(1, 'warm_start.num_layers', 'warm_start.num_heads'),
  *_at_least(1, 'warm_start.num_key_value_heads'),
  *_within(0, 1, 'loss.clip_low'),
  *_at_least(0, 'loss.clip_high'),
  _Rule('loss.dual_clip', lambda x: x == 0 or x > 1, '0 (off) or above 1'),
  _Rule('selection.ratio', lambda x: 0 < x <= 1, 'above 0, at most 1'),
  *_at_least(1, 'learner.minibatch', 'learner.epochs', 'learner.score_chunk'),
  *_at_least(1, 'eval.prompts', 'eval.members'),
  *_at_least(1, 'checkpoint.every', 'checkpoint.keep'),
  *_at_least(1, 'warm_start.episodes', 'warm_start.batch'),
  *_at_least(2, 'warm_start.steps'),  # a warm-up and a decay
  *_at_least(260, 'warm_start.vocab_size'),
  *[
    _Rule(f'mesh.{f}', lambda x: x == -1 or x >= 1, '-1 (the rest), 1 or more')
    for f in schema.MESH
  ],
]


def check(c: ml_collections.ConfigDict):
  """Refuses values that cannot work, before anything is made.

  Args:
    c: The config.

  Raises:
    UsageError: One sentence: the field, its value, what is allowed.
  """
  for field, value in schema.flatten(c).items():
    if isinstance(value, float) and not math.isfinite(value):
      raise errors.UsageError(f'{field} is {value}; allowed: a finite number.')
  _check_fields(c)
  for rule in _RULES:
    value = schema.get(c, rule.field)
    if not rule.holds(value):
      raise errors.UsageError(
        f'{rule.field} is {value!r}; allowed: {rule.allowed}.'
      )
  _check_choices(c)
  _check_unread(c)
  if c.algo == 'grpo' and c.rollout.members < 2:
    raise errors.UsageError(
      f'rollout.members is {c.rollout.members}, but GRPO compares the members '
      'of a group with each other; allowed: 2 or more.'
    )
  if c.model.revision and not c.model.path:
    raise errors.UsageError(
      f'model.revision is {c.model.revision!r}, but model.path names no model; '
      "allowed: '' unless model.path is a hub id."
    )
  _check_batches(c)
  _check_lengths(c)
  _check_heads(c)
  env_validate.check(c)
  _check_seeds(c)
  _check_open_sizes(c)
  check_mesh(c, known_shards(c))


def _check_fields(c: ml_collections.ConfigDict):
  """Refuses fields that no code reads: a typo in a config file."""
  known = schema.flatten(schema.schema_of(c))
  for field in sorted(schema.flatten(c).keys() - known.keys()):
    raise errors.UsageError(schema.unknown_field(field, known))


# What a mixture has in the section of each environment instead.
_OF_EACH = (
  'limits.turns',
  'limits.max_actions',
  'limits.action_budget',
  'env.boards',
  'player.name',
)


def _check_choices(c: ml_collections.ConfigDict):
  """Refuses what would silently do nothing."""
  allowed = schema.ESTIMATORS_OF[c.algo]
  chosen = c.advantage.estimator
  if chosen != 'auto' and chosen not in allowed:
    raise errors.UsageError(
      f'advantage.estimator is {chosen!r}; allowed with algo {c.algo}: auto, '
      f'{", ".join(allowed)}.'
    )
  default = schema.flatten(schema.schema_of(c))
  for field, value in schema.flatten(c).items():
    if value == default[field]:
      continue
    if not schema.has_field(c, field):
      raise errors.UsageError(
        f'{field} is {value!r}, but algo is {c.algo} and the estimator '
        f'{schema.estimator(c)}, which have none; allowed: '
        f'{default[field]!r}, its default.'
      )
    if c.mixture and field in _OF_EACH:
      raise errors.UsageError(
        f'{field} is {value!r}, but each environment of a mixture has its own; '
        f'allowed: {default[field]!r}, its default, unless there is no mixture.'
      )


# Fields that some choices do not read: (fields, whether they are read, when).
_UNREAD = (
  (
    ('weights.share',),
    lambda c: c.weights.scheme == 'top_entropy',
    'weights.scheme is top_entropy',
  ),
  (
    tuple(
      f'weights.{name}'
      for name in ('signal', 'alpha', 'beta', 'alpha_end', 'beta_end')
    ),
    lambda c: c.weights.scheme == 'action',
    'weights.scheme is action',
  ),
  (
    ('weights.signal',),
    schema.has_signal,
    'weights.beta or weights.beta_end is above 0',
  ),
  (
    ('weights.alpha_end', 'weights.beta_end'),
    lambda c: c.weights.schedule_steps > 0,
    'weights.schedule_steps is above 0',
  ),
  (
    ('weights.schedule_steps',),
    lambda c: (c.weights.alpha_end, c.weights.beta_end) != (None, None),
    'weights.alpha_end or weights.beta_end is set',
  ),
  (
    ('kl.estimator',),
    lambda c: c.kl.coefficient > 0,
    'kl.coefficient is above 0',
  ),
  (
    ('selection.patience',),
    schema.skips_without_spread,
    'steps are skipped: with grpo, or where groups are selected',
  ),
  (
    ('learner.importance_cap',),
    # With the sampler's own log-probs the ratio corrects for it already.
    lambda c: c.learner.old_logprob == 'rescore',
    'learner.old_logprob is rescore',
  ),
)


def _check_unread(c: ml_collections.ConfigDict):
  """Refuses numbers that would change nothing."""
  default = schema.schema_of(c)
  for fields, is_read, when in _UNREAD:
    for field in fields:
      value, usual = schema.get(c, field), schema.get(default, field)
      if value != usual and not is_read(c):
        raise errors.UsageError(
          f'{field} is {value!r}, which nothing reads; allowed: {usual!r}, its '
          f'default, unless {when}.'
        )
  if 0 < c.num_steps <= c.critic.warmup:
    raise errors.UsageError(
      f'critic.warmup is {c.critic.warmup} of num_steps {c.num_steps}, so the '
      'policy would never learn; allowed: less.'
    )


def _check_heads(c: ml_collections.ConfigDict):
  w = c.warm_start
  if w.hidden_size % (2 * w.num_heads):
    raise errors.UsageError(
      f'warm_start.num_heads is {w.num_heads}, which does not cut the '
      f'{w.hidden_size} units of warm_start.hidden_size into heads of even '
      'size; allowed: divisors of half of it.'
    )
  if w.num_heads % w.num_key_value_heads:
    raise errors.UsageError(
      f'warm_start.num_key_value_heads is {w.num_key_value_heads}; allowed: '
      f'divisors of warm_start.num_heads, {w.num_heads}.'
    )


def _check_seeds(c: ml_collections.ConfigDict):
  if c.eval.first_seed + c.eval.prompts > schema.FIRST_TRAINING_SEED:
    raise errors.UsageError(
      f'eval.first_seed is {c.eval.first_seed} for {c.eval.prompts} boards, '
      f'which reach into those of training; allowed: up to '
      f'{schema.FIRST_TRAINING_SEED - c.eval.prompts}.'
    )


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
    raise errors.UsageError(
      f'{field} is {value}, which does not divide the {whole} {what}; '
      f'allowed: {", ".join(allowed)}.'
    )


def _check_lengths(c: ml_collections.ConfigDict):
  lengths, context = tuple(c.rollout.lengths), c.limits.context
  if lengths and (list(lengths) != sorted(lengths) or lengths[-1] < context):
    raise errors.UsageError(
      f'rollout.lengths is {lengths}; allowed: rising numbers of which the '
      f'last is at least limits.context, {context}.'
    )


def _check_open_sizes(c: ml_collections.ConfigDict):
  """Refuses a mesh of which two sizes would be what the others leave."""
  for names in (('data', 'fsdp', 'tensor'), ('dcn_data', 'dcn_fsdp')):
    fields = [f'mesh.{name}' for name in names if c.mesh[name] == -1]
    if len(fields) > 1:
      raise errors.UsageError(
        f'{fields[0]} and {fields[1]} are both -1, what the other sizes leave; '
        f'allowed: -1 for one of {", ".join(names)}.'
      )


def known_shards(c: ml_collections.ConfigDict) -> int:
  """Into how many parts the mesh cuts rows, open sizes counted as 1.

  With them it is a multiple of this, on whatever machine.
  """
  names = ('data', 'fsdp', 'dcn_data', 'dcn_fsdp')
  return math.prod(max(c.mesh[name], 1) for name in names)


def mesh_rows(c: ml_collections.ConfigDict) -> dict[str, int]:
  """The numbers of rows that the mesh must cut into equal parts, by field.

  Boards need not be cut evenly: a shard plays episodes, and reads the openings
  of those boards that it needs.
  """
  return {
    'rollout.prompts * rollout.members': c.rollout.prompts * c.rollout.members,
    'learner.minibatch': c.learner.minibatch,
    'learner.microbatch': c.learner.microbatch or c.learner.minibatch,
  }


def check_mesh(c: ml_collections.ConfigDict, shards: int):
  """Refuses batches that the mesh cannot split.

  Args:
    c: The config.
    shards: Devices along the mesh's data and fsdp axes.

  Raises:
    UsageError: One sentence.
  """
  sizes = mesh_rows(c)
  for field, size in sizes.items():
    if size % shards:
      common = math.gcd(*sizes.values())
      fitting = [n for n in range(1, common + 1) if common % n == 0]
      near = sorted(fitting, key=lambda n: abs(math.log(n / shards)))[:3]
      raise errors.UsageError(
        f'{field} is {size}, which mesh.data * mesh.fsdp, {shards} over all '
        f'slices, cannot share equally; allowed: multiples of {shards}, or '
        f'mesh.data * mesh.fsdp of {", ".join(map(str, sorted(near)))}.'
      )


def kept_rows(c: ml_collections.ConfigDict) -> int:
  """Trajectories that group selection leaves for training.

  `top_p` keeps a number that is not known beforehand; all rows go on, those of
  the other groups without a token in the loss.
  """
  if c.selection.rule == 'top_p':
    return c.rollout.prompts * c.rollout.members
  # The small amount forgives 0.1 * 30 being 3.0000000000000004.
  kept = math.ceil(c.selection.ratio * c.rollout.prompts - 1e-9)
  return kept * c.rollout.members
