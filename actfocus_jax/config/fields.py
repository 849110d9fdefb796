"""Fields of the config, one row each: name, default, allowed, meaning.

`schema.defaults` builds a config from the rows, `validate.check` checks one
against them, `schema.help_text` and the tables of configs/README.md print them.
Lists of choices and default numbers of the algorithm and of the environments
are read from the functions and classes that use them.
"""

import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from actfocus_jax import envs, errors
from actfocus_jax.algorithm import (
  estimators,
  losses,
  selection,
  signals,
  turns,
  weights,
)
from actfocus_jax.config import plugins
from actfocus_jax.model import attention
from actfocus_jax.text import template

ENVS = tuple(envs.ENVS)
MIXTURE = 'mixture'  # `env.name` of a run on several environments
ALGOS = ('grpo', 'ppo')
# Estimators of each algorithm; `auto` is the first.
ESTIMATORS_OF = {
  algo: tuple(n for n, e in estimators.ESTIMATORS.items() if e.algo == algo)
  for algo in ALGOS
}


# --- What a row is -----------------------------------------------------------


class Allowed(NamedTuple):
  """Values that a field allows: a phrase for messages, and a predicate.

  `kind` is the type of the value; it is read only where the default is None.
  """

  text: str
  holds: Callable[[Any], bool] = lambda x: True
  kind: type = float


class Field(NamedTuple):
  """Row of one field; a default of None becomes a placeholder in a config."""

  name: str
  default: Any
  allowed: Allowed
  meaning: str


def one_of(*values: Any) -> Allowed:
  """Allow the values of a list."""
  return Allowed(', '.join(map(str, values)), lambda x: x in values)


def at_least(low: float) -> Allowed:
  """Allow a lower bound and what is above it."""
  return Allowed(f'{low:g} or more', lambda x: x >= low)


def above(low: float) -> Allowed:
  """Allow what is above a bound, but not the bound."""
  return Allowed(f'above {low:g}', lambda x: x > low)


def within(low: float, high: float) -> Allowed:
  """Allow two bounds and what is between them."""
  return Allowed(f'{low:g} to {high:g}', lambda x: low <= x <= high)


def optional(allowed: Allowed, kind: type = float) -> Allowed:
  """Allow None besides other values, which have the given type."""
  return Allowed(
    f'None or {allowed.text}', lambda x: x is None or allowed.holds(x), kind
  )


def _is_board_file(path: str) -> bool:
  return not path or pathlib.Path(path).expanduser().is_file()


_TEXT = Allowed('any text')
_FLAG = one_of(True, False)
_ANY = Allowed('values of its type')
_SHARE = Allowed('above 0, at most 1', lambda x: 0 < x <= 1)
_SIZE = Allowed('-1 (the rest), 1 or more', lambda x: x == -1 or x >= 1)
_DUAL_CLIP = Allowed('0 (off) or above 1', lambda x: x == 0 or x > 1)
_BOARDS = Allowed("'' or a file of boards", _is_board_file)
_LENGTHS = Allowed('(), or rising numbers up to limits.context or more')
_ENV = Allowed(f'{", ".join(ENVS)} or package.module:Class')
_PLAYER = Allowed('a player of the environment or package.module:Class')

_Row = tuple[Any, Allowed, str]


def _section(name: str, **rows: _Row) -> list[Field]:
  return [Field(f'{name}.{leaf}', *row) for leaf, row in rows.items()]


def _arguments(
  section: str, function: Callable[..., Any], **rows: tuple[Allowed, str]
) -> list[Field]:
  """Return the rows of keyword arguments, with the defaults of a signature."""
  arguments = inspect.signature(function).parameters
  fields = []
  for name, row in rows.items():
    # An environment writes its own `instructions` for None; a config has ''.
    default = arguments[name].default
    default = '' if default is None else default
    fields.append(Field(f'{section}.{name}', default, *row))
  return fields


# --- Rows of all configs, with the values of the paper (arXiv 2605.14558) ----

# fmt: off

_NORMALIZE = (_FLAG, 'divide by the standard deviation of the group')
_DISCOUNT = (within(0, 1), 'discount per turn')
_COMPUTE = {n: e.compute for n, e in estimators.ESTIMATORS.items()}
_CREDIT = [
  *_arguments('advantage.group_relative', _COMPUTE['group_relative'],
    normalize_std=_NORMALIZE),
  *_arguments('advantage.gigpo', _COMPUTE['gigpo'],
    normalize_std=_NORMALIZE,
    step_weight=(at_least(0), 'weight of the step-level advantage'),
    discount=_DISCOUNT),
  *_arguments('advantage.empg', _COMPUTE['empg'],
    normalize_std=_NORMALIZE,
    scale=(at_least(0), 'strength of the modulation by entropy'),
    clarity_scale=(at_least(0), 'strength within the clarity bonus'),
    clarity_bonus=(at_least(0), 'weight of the clarity bonus')),
  *_arguments('advantage.gae', _COMPUTE['gae'],
    reward_placement=(one_of(*estimators.REWARD_PLACEMENTS),
      '`final`: the return on the last sampled token; `turn`: each reward on '
      'the end of its turn'),
    discount=(within(0, 1), 'discount per sampled token'),
    lam=(within(0, 1), 'lambda per sampled token')),
  *_arguments('advantage.turn_gae', _COMPUTE['turn_gae'],
    discount=_DISCOUNT,
    lam=(within(0, 1), 'lambda per turn')),
]


def _adamw(learning_rate: float) -> dict[str, _Row]:
  return dict(
    learning_rate=(learning_rate, above(0), 'rate after the warm-up'),
    warmup_steps=(0, at_least(0), 'optimizer steps in which the rate rises'),
    b1=(0.9, within(0, 0.999999), 'decay of the first moment'),
    b2=(0.999, within(0, 0.999999), 'decay of the second moment'),
    weight_decay=(0.01, at_least(0), 'decay of matrices; vectors have none'),
    clip_norm=(1.0, above(0), 'largest norm of the whole gradient'),
  )


_COMMON = [
  Field('seed', 0, at_least(0), 'seed of every random number of the run'),
  Field('num_steps', 200, at_least(0), 'training steps'),
  Field('algo', 'grpo', one_of(*ALGOS),
    '`grpo`: advantages relative to the group; `ppo`: with a critic'),
  Field('entropy_coefficient', 0.001, at_least(0),
    'weight of the entropy bonus in the loss'),
  *_section('env',
    threads=(0, at_least(0),
      'environments that run at a time; 0 is one after the other'),
    time_limit=(None, optional(above(0)),
      'seconds that a reset or a turn may take, in threads only')),
  *_section('limits',
    response_tokens=(400, at_least(1), 'most sampled tokens of a turn'),
    context=(3600, at_least(1), 'most tokens of an episode, prompts included'),
    format_penalty=(-0.1, within(-100, 0),
      'added to the return of a turn that breaks the format')),
  *_section('model',
    path=('', Allowed("'', a Hugging Face directory or hub id"),
      "directory or hub id; '' makes the built-in model of `warm_start`"),
    revision=('', _TEXT, "revision of a hub id; '' is its main branch"),
    rendering=('template', one_of(*template.RENDERINGS),
      'messages by the chat template; use `plain` if the chat template '
      'rewrites earlier turns'),
    dtype=('auto', one_of('auto', 'float32', 'bfloat16'),
      'dtype of the computation; `auto` is bfloat16 on accelerators and '
      'float32 on CPU. Master weights are float32'),
    remat=(False, _FLAG, 'recompute activations in the backward pass'),
    attention=('auto', one_of('auto', *attention.BACKENDS),
      'kernel for whole rows, in scoring and update; `auto` is that of the '
      'platform')),
  *_section('rollout',
    prompts=(8, at_least(1), 'boards (groups) a step'),
    members=(16, at_least(1), 'episodes of each board; GRPO needs 2 or more'),
    temperature=(1.0, above(0), 'sampling temperature'),
    slots=(128, at_least(0), 'episodes at a time; 0 is all of them'),
    decode_steps=(8, at_least(1),
      'tokens decoded before the host takes the finished turns'),
    observation_block=(32, at_least(1),
      'prompts and observations are padded to 1, 2, 4, ... times this'),
    cache_block=(128, at_least(1),
      'attention reads 1, 2, 4, ... times this many positions'),
    lengths=((), _LENGTHS,
      'a batch is padded to the first length that suffices; () is '
      '`limits.context`')),
  *_section('selection',
    ratio=(1.0, _SHARE,
      'share of the groups (`top_k`) or of the summed spread (`top_p`)'),
    rule=('top_k', one_of(*selection.RULES), 'meaning of `selection.ratio`'),
    patience=(20, at_least(1),
      'steps in a row without spread in any group after which training '
      'stops')),
  *_section('weights',
    scheme=('action', one_of(*weights.SCHEMES),
      '`action`: alpha on thoughts, 1 + beta sigmoid(z) on actions, z being '
      'the standardized signal; `top_entropy`: 1 on the tokens of the '
      'highest entropy, else 0'),
    signal=('energy', one_of(*signals.SIGNALS), 'signal of action tokens'),
    alpha=(0.1, within(0, 1), 'weight of tokens outside actions'),
    beta=(0.5, at_least(0), 'largest extra weight of action tokens'),
    alpha_end=(None, optional(within(0, 1)),
      'alpha after `schedule_steps`; None keeps alpha'),
    beta_end=(None, optional(at_least(0)),
      'beta after `schedule_steps`; None keeps beta'),
    schedule_steps=(0, at_least(0),
      'training steps in which alpha and beta move in a straight line'),
    share=(0.2, _SHARE,
      'share of the sampled tokens to which `top_entropy` gives weight 1')),
  *_section('advantage',
    estimator=('auto', one_of('auto', *_COMPUTE),
      '`auto` is ' + ', '.join(
        f'{names[0]} with {algo}' for algo, names in ESTIMATORS_OF.items()))),
  *_CREDIT,
  *_section('loss',
    clip_low=(0.2, within(0, 1), 'the ratio is clipped below at 1 - clip_low'),
    clip_high=(0.28, at_least(0),
      'the ratio is clipped above at 1 + clip_high'),
    dual_clip=(3.0, _DUAL_CLIP,
      'for A < 0 the loss is at most -dual_clip * A'),
    reduction=('weighted_token_mean', one_of(*losses.REDUCTIONS),
      'mean over the tokens of a mini-batch, or of each row and then over '
      'rows')),
  *_section('kl',
    coefficient=(0.0, at_least(0), 'weight of the term; 0 is off'),
    estimator=('k1', one_of(*losses.KL_ESTIMATORS), 'estimator of the KL')),
  *_section('critic',
    clip=(0.5, above(0), 'largest move of the value in one update'),
    warmup=(0, at_least(0), 'steps in which only the critic learns')),
  *_section('critic.optimizer', **_adamw(1e-5)),
  *_section('optimizer', **_adamw(1e-6)),
  *_section('learner',
    minibatch=(32, at_least(1), 'trajectories of an optimizer step'),
    microbatch=(0, at_least(0),
      'trajectories of a forward and backward pass; 0 is the mini-batch'),
    epochs=(1, at_least(1), 'passes over the batch'),
    old_logprob=('rescore', one_of('sampler', 'rescore'),
      'old log-probs: log-probs of the sampler, or of a fresh forward pass'),
    importance_cap=(None, optional(above(0)),
      'upper bound of the importance weight of a token; None turns it off'),
    ratio=('token', one_of(*turns.LOGPROB_POOLINGS),
      'ratio of a token, or of its whole turn (mean of the log-ratios)'),
    fused=(True, _FLAG,
      'one program for scoring and update, or two that are timed apart'),
    self_check=(True, _FLAG,
      'stop before the first update if the self-check fails'),
    score_chunk=(512, at_least(1),
      'tokens whose logits are in memory at a time')),
  *_section('eval',
    every=(10, at_least(0),
      'training steps between two; 0 is before and after training only'),
    prompts=(32, at_least(1), 'boards'),
    members=(16, at_least(1), 'episodes of each board'),
    temperature=(0.5, above(0), 'sampling temperature'),
    first_seed=(123, at_least(0), 'seed of the first board'),
    save=(16, at_least(0), 'trajectories written for the viewer')),
  *_section('checkpoint',
    every=(10, at_least(1), 'training steps between two checkpoints'),
    keep=(2, at_least(1), 'newest ones that are kept, besides the best')),
  *_section('mesh',
    data=(-1, _SIZE, 'rows are split, parameters copied'),
    fsdp=(1, _SIZE, 'rows and parameters are split'),
    tensor=(1, _SIZE, 'heads, hidden units and the vocabulary are split'),
    dcn_data=(-1, _SIZE, '`data` over slices'),
    dcn_fsdp=(1, _SIZE, '`fsdp` over slices')),
  *_section('warm_start',
    cache=('runs/warm_starts', _TEXT, 'directory that keeps the models'),
    episodes=(2048, at_least(1), 'demonstrations'),
    steps=(300, at_least(2), 'optimizer steps'),
    batch=(32, at_least(1), 'demonstrations of a step'),
    learning_rate=(4e-3, above(0), 'largest rate'),
    observation_weight=(0.0, at_least(0),
      'weight of the tokens that the environment wrote'),
    vocab_size=(768, at_least(260), 'size of the tokenizer'),
    hidden_size=(128, at_least(1), 'width'),
    intermediate_size=(256, at_least(1), 'width of the MLP'),
    num_layers=(2, at_least(1), 'layers'),
    num_heads=(4, at_least(1), 'query heads'),
    num_key_value_heads=(1, at_least(1), 'key heads'),
    seed=(0, at_least(0),
      'seed of the demonstrations, the initial weights and the batches')),
]

# --- Rows of environments ----------------------------------------------------

_INSTRUCTIONS = (_TEXT, "text for the model; '' is the environment's own")
_OPTIONS = {
  'frozen_lake': dict(
    size=(within(2, 16), 'rows and columns'),
    frozen_probability=(within(0.1, 1), 'chance of a tile to be ice'),
    success_probability=(within(0, 1),
      'chance to go in the intended direction'),
    instructions=_INSTRUCTIONS),
  'sokoban': dict(
    rows=(within(3, 32), 'height with the border walls'),
    cols=(within(3, 32), 'width with the border walls'),
    boxes=(within(1, 5), 'boxes and targets'),
    search_depth=(within(1, 10_000), 'longest reverse play of the generator'),
    walk_steps=(within(1, 10_000), 'steps of the walk that digs the floor'),
    instructions=_INSTRUCTIONS),
  'sudoku': dict(
    size=(one_of(4, 9), 'rows, columns and numbers'),
    blanks=(within(1, 81), 'empty cells of a generated board'),
    max_steps=(within(1, 1000), 'actions in an episode, valid or not'),
    allow_refill_reward=(_FLAG, 'reward a valid number in a cell again'),
    instructions=_INSTRUCTIONS),
  'webshop': dict(
    data=(_TEXT, "directory of the public files; '' is a small shop"),
    goals=(one_of('synthetic', 'human'), 'who wrote the instructions'),
    reward=(one_of('strict', 'graded'), 'success only, or partial reward'),
    index=(_TEXT, "directory of the shop on disk; '' is beside `data`"),
    results_per_page=(within(1, 50), 'products on a page of results'),
    shop_seed=(at_least(0), 'seed of the small shop'),
    products=(within(10, 10_000), 'products of the small shop'),
    instructions=_INSTRUCTIONS),
}
# Fields of the scripted players; None is the player's own value.
_SKILL = dict(
  skill=(None, optional(within(0, 1)), 'chance of a good action'),
  habit=(None, optional(within(0, 1)),
    'chance to act by habit, whatever was thought'),
)
_LENGTH = {'length': (None, optional(within(1, 100), int), 'actions in a turn')}
_PLAYERS = dict.fromkeys(('frozen_lake', 'sokoban', 'sudoku'), _SKILL | _LENGTH)
_PLAYERS['webshop'] = _SKILL
# Limits of an episode, as in the paper.
_LIMIT_MEANINGS = dict(
  turns='most turns of an episode',
  max_actions='most actions of a turn',
  action_budget='most actions of an episode',
)
_COMMON_LIMITS = (5, 2, 10)
_LIMITS = {'sudoku': (8, 2, 16), 'webshop': (9, 1, 9)}

# fmt: on


def limits(env: str) -> dict[str, int]:
  """Return the default turns, max_actions and action_budget."""
  numbers = _LIMITS.get(env, _COMMON_LIMITS)
  return dict(zip(_LIMIT_MEANINGS, numbers, strict=True))


def _options(section: str, env: str) -> list[Field]:
  if env in ENVS:
    return _arguments(section, envs.ENVS[env], **_OPTIONS[env])
  if env == MIXTURE:
    return []
  if ':' not in env:
    raise errors.UsageError(
      f'env.name is {env!r}; allowed: {", ".join(ENVS)}, or '
      'package.module:Class for one of your own.'
    )
  defaults = plugins.options('env.name', env)
  return [Field(f'{section}.{n}', x, _ANY, '') for n, x in defaults.items()]


def _environment(
  name: str, env: str = 'env', bounds: str = 'limits', player: str = 'player'
) -> list[Field]:
  """Return the rows of one environment in the sections that are named."""
  player_rows = _PLAYERS.get(name, {})
  default_player = 'careless' if player_rows else 'random'
  return [
    Field(f'{env}.name', name, _ENV, 'environment'),
    Field(f'{env}.boards', '', _BOARDS, "file of boards; '' generates boards"),
    *_options(f'{env}.options', name),
    *(
      Field(f'{bounds}.{leaf}', limits(name)[leaf], at_least(1), meaning)
      for leaf, meaning in _LIMIT_MEANINGS.items()
    ),
    Field(f'{player}.name', default_player, _PLAYER, 'writes demonstrations'),
    *(
      Field(f'{player}.options.{leaf}', *row)
      for leaf, row in player_rows.items()
    ),
  ]


def _mixture(shares: Mapping[str, float]) -> list[Field]:
  """Return the rows of the environments of a mixture."""
  labels: dict[str, str] = {}
  fields = []
  for name, groups in shares.items():
    label = name.rpartition(':')[2].lower()
    if label in labels:
      raise errors.UsageError(
        f'env.name {name!r} and {labels[label]!r} have the same label in a '
        f'mixture, {label}; allowed: classes of different names.'
      )
    labels[label], section = name, f'mixture.{label}'
    fields += _environment(name, section, section, f'{section}.player')
    fields.append(_share_of_groups(section, float(groups)))
  return fields


def _share_of_groups(section: str, default: float) -> Field:
  meaning = 'share of the groups, relative to the other environments'
  return Field(f'{section}.share', default, above(0), meaning)


def rows(env: str | Mapping[str, float]) -> dict[str, Field]:
  """Return the rows of a config by name; see `defaults`."""
  is_one = isinstance(env, str)
  env_rows = _environment(env if is_one else MIXTURE)
  env_rows += [] if is_one else _mixture(env)
  return {field.name: field for field in (*env_rows, *_COMMON)}


# --- For help and pages ------------------------------------------------------

_LABEL = 'mixture.LABEL'  # stands for the section of any environment
_ABOUT = {
  'run': 'Fields without a section.',
  'env': 'The environment, which the config file chooses. The options here are '
  f'those of {ENVS[0]}.',
  'mixture': f'Each environment of a mixture has a section {_LABEL} with its '
  'share of the groups and the fields name, options, boards, turns, '
  'max_actions, action_budget and player. LABEL is the name of the environment '
  'or, in lower case, of your own class.',
  'limits': 'Bounds of an episode. Other defaults of turns, max_actions and '
  'action_budget: '
  + '; '.join(
    f'{env} {", ".join(map(str, bounds))}' for env, bounds in _LIMITS.items()
  )
  + '.',
  'player': 'The scripted player of the warm start. A class of your own has no '
  'options; webshop has no length.',
  'model': 'The policy, which also becomes the frozen reference.',
  'rollout': 'prompts x members episodes a step. The other fields shape the '
  'work on the device.',
  'selection': 'Groups to train on, by the spread of their returns.',
  'weights': 'Weight of each token in the policy loss.',
  'advantage': 'The advantage estimator, and the numbers of each one.',
  'loss': 'The clipped surrogate, `losses.policy_loss`.',
  'kl': 'KL to the frozen reference, as a loss term.',
  'critic': 'The critic of PPO and its AdamW.',
  'optimizer': 'AdamW of the policy.',
  'learner': 'The update.',
  'eval': 'Success on held-out boards.',
  'checkpoint': 'Checkpoints of a run.',
  'mesh': 'Sizes of the device mesh, inside a slice and over slices (dcn_*). '
  'One inner size and one dcn size may be -1.',
  'warm_start': 'The built-in model and its supervised training on '
  'demonstrations.',
}


def documented() -> list[tuple[str, str, list[Field]]]:
  """Return name, sentence and rows of each section, for every environment."""
  groups: dict[str, list[Field]] = {name: [] for name in _ABOUT}
  groups['mixture'].append(_share_of_groups(_LABEL, 1.0))
  for name, field in rows(ENVS[0]).items():
    groups[name.partition('.')[0] if '.' in name else 'run'].append(field)
  sections = [(name, _ABOUT[name], group) for name, group in groups.items()]
  others = [
    ('env.options', f'Options of {env}.', _options('env.options', env))
    for env in ENVS[1:]
  ]
  return [*sections[:2], *others, *sections[2:]]
