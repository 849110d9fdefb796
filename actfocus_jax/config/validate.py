"""Checks of a config: its rows, and rules that concern several fields."""

import math
from typing import Any

import ml_collections

from actfocus_jax import errors
from actfocus_jax.algorithm import selection
from actfocus_jax.config import fields, plugins, schema

ConfigDict = ml_collections.ConfigDict


def check(c: ConfigDict):
  """Refuse a config that cannot work, before anything is made.

  Raises:
    UsageError: one sentence with the field, its value and what is allowed.
  """
  rows = fields.rows(schema.env_of(c))
  values = schema.flatten(c)
  for field in sorted(values.keys() - rows.keys()):
    raise errors.UsageError(schema.unknown_field(field, sorted(rows)))
  for field, value in values.items():
    is_finite = not isinstance(value, float) or math.isfinite(value)
    _require(is_finite, field, value, 'a finite number')
    allowed = rows[field].allowed
    _require(allowed.holds(value), field, value, allowed.text)
  _check_effects(c, values)
  _check_batches(c)
  _check_numbers(c)
  for section in schema.sections(c):
    _check_blanks(section)
    _check_player(section, plays=not c.model.path)
  _check_open_sizes(c)
  check_mesh(c, known_shards(c))


def _require(holds: bool, field: str, value: Any, allowed: str, why: str = ''):
  if not holds:
    raise errors.UsageError(f'{field} is {value!r}{why}; allowed: {allowed}.')


# --- Fields that have no effect ----------------------------------------------

# fmt: off
# Fields or sections, and the condition under which they have an effect.
_EFFECTS = [
  *((f'advantage.{name}', lambda c, name=name: schema.estimator(c) == name,
     f'algo={algo} and advantage.estimator={name}'
     + (' or auto' if name == names[0] else ''))
    for algo, names in schema.ESTIMATORS_OF.items() for name in names),
  ('critic', lambda c: c.algo == 'ppo', 'algo=ppo'),
  *((field, lambda c: not c.mixture,
     'there is no mixture (set it in the section mixture.LABEL)')
    for field in (*(f'limits.{name}' for name in fields.limits('')),
                  'env.boards', 'player.name')),
  ('env.time_limit', lambda c: c.env.threads > 0, 'env.threads is 1 or more'),
  ('model.revision', lambda c: c.model.path, 'model.path is a hub id'),
  ('weights.share', lambda c: c.weights.scheme == 'top_entropy',
   'weights.scheme=top_entropy'),
  *((f'weights.{name}', lambda c: c.weights.scheme == 'action',
     'weights.scheme=action')
    for name in ('signal', 'alpha', 'beta', 'alpha_end', 'beta_end')),
  ('weights.signal', schema.has_signal,
   'weights.beta or weights.beta_end is above 0'),
  *((f'weights.{name}', lambda c: c.weights.schedule_steps > 0,
     'weights.schedule_steps is above 0')
    for name in ('alpha_end', 'beta_end')),
  ('weights.schedule_steps',
   lambda c: (c.weights.alpha_end, c.weights.beta_end) != (None, None),
   'weights.alpha_end or weights.beta_end is set'),
  ('kl.estimator', lambda c: c.kl.coefficient > 0, 'kl.coefficient is above 0'),
  ('selection.patience', schema.skips_without_spread,
   'algo=grpo or groups are selected'),
  # With the sampler's own log-probs the ratio corrects for it already.
  ('learner.importance_cap', lambda c: c.learner.old_logprob == 'rescore',
   'learner.old_logprob=rescore'),
]
# fmt: on


def _check_effects(c: ConfigDict, values: dict[str, Any]):
  """Refuse a changed field that other fields leave without effect."""
  names, name = ('auto', *schema.ESTIMATORS_OF[c.algo]), c.advantage.estimator
  why, allowed = f' with algo={c.algo}', ', '.join(names)
  _require(name in names, 'advantage.estimator', name, allowed, why)
  default = schema.flatten(schema.schema_of(c))
  changed = [field for field in values if values[field] != default[field]]
  for prefix, has_effect, condition in _EFFECTS:
    why = f', which has no effect unless {condition}'
    for field in changed:
      holds = not f'{field}.'.startswith(f'{prefix}.') or has_effect(c)
      allowed = f'{default[field]!r}, its default'
      _require(holds, field, values[field], allowed, why)


# --- Rules of several fields -------------------------------------------------


def _check_batches(c: ConfigDict):
  members, why = c.rollout.members, ', but GRPO compares the members of a group'
  holds = c.algo != 'grpo' or members >= 2
  _require(holds, 'rollout.members', members, '2 or more', why)
  minibatch, microbatch = c.learner.minibatch, c.learner.microbatch
  kept = kept_rows(c)
  _check_divides('learner.minibatch', minibatch, kept, 'kept trajectories')
  if microbatch:
    of = 'trajectories of learner.minibatch'
    _check_divides('learner.microbatch', microbatch, minibatch, of)


def _check_divides(field: str, value: int, whole: int, noun: str):
  divisors = (str(n) for n in range(1, whole + 1) if whole % n == 0)
  why = f', which does not divide the {whole} {noun}'
  _require(whole % value == 0, field, value, ', '.join(divisors), why)


def _check_numbers(c: ConfigDict):
  lengths, context, w = c.rollout.lengths, c.limits.context, c.warm_start
  rises = list(lengths) == sorted(lengths)
  most = schema.FIRST_TRAINING_SEED - c.eval.prompts
  # fmt: off
  for holds, field, allowed, why in (
    (rises and (not lengths or lengths[-1] >= context), 'rollout.lengths',
     f'rising numbers up to limits.context, {context}, or more', ''),
    (not 0 < c.num_steps <= c.critic.warmup, 'critic.warmup',
     f'less than num_steps, {c.num_steps}',
     ', so the policy would never learn'),
    (c.eval.first_seed <= most, 'eval.first_seed', f'up to {most}',
     f', from which {c.eval.prompts} boards reach those of training'),
    (w.hidden_size % (2 * w.num_heads) == 0, 'warm_start.num_heads',
     'divisors of half of warm_start.hidden_size',
     f', which does not cut {w.hidden_size} units into heads of even size'),
    (w.num_heads % w.num_key_value_heads == 0,
     'warm_start.num_key_value_heads',
     f'divisors of warm_start.num_heads, {w.num_heads}', ''),
  ):
    _require(holds, field, schema.get(c, field), allowed, why)
  # fmt: on


def _check_blanks(section: schema.Section):
  """Refuse boards of Sudoku with more empty cells than actions."""
  if section.name != 'sudoku' or section.boards:
    return
  options, bounds = section.options, section.limits_field
  turn_actions = section.turns * section.max_actions
  most = min(options.max_steps, section.action_budget, turn_actions)
  _require(
    options.blanks <= most,
    f'{section.field}.options.blanks',
    options.blanks,
    f'{most} or fewer, or more actions ({section.field}.options.max_steps, '
    f'{bounds}.action_budget, {bounds}.turns and {bounds}.max_actions)',
    f', more than the {most} actions of an episode',
  )


def _check_player(section: schema.Section, *, plays: bool):
  """Refuse options of a user's player, and a class that cannot be imported."""
  name, field = section.player.name, section.player_field
  if ':' not in name:
    return
  why = f', but {field}.name is {name!r}, a class without options'
  for option, value in section.player.options.items():
    _require(value is None, f'{field}.options.{option}', value, 'None', why)
  if plays:  # Only the built-in model is made from demonstrations.
    plugins.load(f'{field}.name', name)


def _check_open_sizes(c: ConfigDict):
  """Refuse two open sizes of a mesh of one kind."""
  for names in (('data', 'fsdp', 'tensor'), ('dcn_data', 'dcn_fsdp')):
    is_open = [f'mesh.{name}' for name in names if c.mesh[name] == -1]
    if len(is_open) > 1:
      raise errors.UsageError(
        f'{is_open[0]} and {is_open[1]} are both -1, what the other sizes '
        f'leave; allowed: -1 for one of {", ".join(names)}.'
      )


def known_shards(c: ConfigDict) -> int:
  """Return the number of row shards of the mesh, open sizes counted as 1.

  The true number is a multiple of it.
  """
  names = ('data', 'fsdp', 'dcn_data', 'dcn_fsdp')
  return math.prod(max(c.mesh[name], 1) for name in names)


def mesh_rows(c: ConfigDict) -> dict[str, int]:
  """Return the numbers of rows that the mesh cuts into equal parts, by field.

  The number of boards is not among them: a shard plays episodes, and reads the
  openings of the boards that it needs.
  """
  return {
    'rollout.prompts * rollout.members': c.rollout.prompts * c.rollout.members,
    'learner.minibatch': c.learner.minibatch,
    'learner.microbatch': c.learner.microbatch or c.learner.minibatch,
  }


def check_mesh(c: ConfigDict, shards: int):
  """Refuse batches that the mesh cannot split, with a UsageError.

  `shards` are the devices along the data and fsdp axes, over all slices.
  """
  sizes = mesh_rows(c)
  common = math.gcd(*sizes.values())
  fitting = [n for n in range(1, common + 1) if common % n == 0]
  near = sorted(fitting, key=lambda n: abs(math.log(n / shards)))[:3]
  others = ', '.join(map(str, sorted(near)))
  allowed = f'multiples of {shards}, or mesh.data * mesh.fsdp of {others}'
  why = f', which mesh.data * mesh.fsdp, {shards} over all slices, cannot share'
  for field, size in sizes.items():
    _require(size % shards == 0, field, size, allowed, f'{why} equally')


def kept_rows(c: ConfigDict) -> int:
  """Return the number of trajectories that group selection leaves.

  `top_p` keeps a number that is not known beforehand. All rows remain then,
  and those of the other groups have no token in the loss.
  """
  groups = c.rollout.prompts
  if c.selection.rule == 'top_k':
    groups = selection.kept_count(groups, c.selection.ratio)
  return groups * c.rollout.members
