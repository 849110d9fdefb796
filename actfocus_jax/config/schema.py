"""The config: every field with its default, its meaning and what it allows.

`defaults()` is the whole schema; the files in configs/ start from it and
change numbers. Most sections are the keyword arguments of one consumer, which
is named beside them. What values they allow is in `checks.py`. Nothing here
imports jax, so that a mistake is told at once.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from actfocus_jax import errors
from actfocus_jax.config import env_schema

ConfigDict = ml_collections.ConfigDict
# Raised all over the project; declared where nothing else is.
UsageError, RunError = errors.UsageError, errors.RunError
NoLearningSignal = errors.NoLearningSignal
ALGOS = ('grpo', 'ppo')
RENDERINGS = ('template', 'plain')  # agent.chat.Chat
ATTENTIONS = ('auto', 'xla', 'splash', 'cudnn')  # model.attention.choose
SIGNALS = (
  'energy',
  'entropy',
  'nll',
  'logprob_shift',
  'random',
  'centered_energy',
)
# Those that are made without a word from the reference.
WITHOUT_REFERENCE = ('nll', 'random')
# The keyword arguments of each algorithm.estimators.ESTIMATORS[name], and with
# which algorithm it goes; the first of each algorithm is what 'auto' means.
ESTIMATORS = {
  'group_relative': dict(normalize_std=True),
  'gigpo': dict(normalize_std=True, step_weight=1.0, discount=0.95),
  'empg': dict(
    normalize_std=True, scale=1.0, clarity_scale=1.0, clarity_bonus=0.1
  ),
  'gae': dict(reward_placement='final', discount=1.0, lam=1.0),
  'turn_gae': dict(discount=0.99, lam=0.9),
}
ESTIMATORS_OF = {
  'grpo': ('group_relative', 'gigpo', 'empg'),
  'ppo': ('gae', 'turn_gae'),
}

# The default mesh: every device holds its own rows and all of the parameters.
MESH = dict(data=-1, fsdp=1, tensor=1, dcn_data=-1, dcn_fsdp=1)

# Boards of training have seeds from here on, those of evaluation below.
FIRST_TRAINING_SEED = 10_000

# `weights=NAME` in a config argument: what the section `weights` changes to.
WEIGHTS = {
  'uniform': dict(signal='energy', alpha=1.0, beta=0.0),
  'actfocus': dict(signal='energy', alpha=0.1, beta=0.5),
  'downweight': dict(signal='energy', alpha=0.1, beta=0.0),
  **{
    name: dict(signal=name, alpha=0.1, beta=0.5)
    for name in SIGNALS
    if name != 'energy'
  },
  'top_entropy': dict(scheme='top_entropy'),
}


def defaults(env: str | Mapping[str, float] = 'frozen_lake') -> ConfigDict:
  """The schema, with the paper's values (method of arXiv 2605.14558).

  Args:
    env: The environment, which decides what options there are: a key of
      env_schema.OPTIONS, or 'package.module:Class', whose options are the
      keyword arguments of the class. Several of them with their shares of
      the groups are a mixture: {'frozen_lake': 1.0, 'sokoban': 3.0}.

  Returns:
    A ConfigDict whose fields are all there are. Config files change values
    and lock it; a field that is not here cannot be set.

  Raises:
    UsageError: When there is no such environment.
  """
  is_mixture = not isinstance(env, str)
  c = ConfigDict()
  c.seed = 0  # names every random number of the run
  c.num_steps = 200
  c.algo = 'grpo'

  # options: of the environment. boards: a file that boards are taken from
  # instead of the environment's own generator. threads: environments that run
  # at a time, 0 for one after the other; time_limit: seconds that a reset or a
  # turn may take, in threads only.
  c.env = dict(
    name=env_schema.MIXTURE if is_mixture else env,
    options={} if is_mixture else env_schema.options(env),
    boards='',
    threads=0,
    time_limit=config_dict.placeholder(float),
  )
  # Of a mixture: a section for each environment, with its share of the groups
  # and what else stands in env, limits and player.
  c.mixture = env_schema.parts(env) if is_mixture else {}

  # path: a Hugging Face directory or hub id, or '' to make the small model of
  # `warm_start`. revision: of a hub id, '' for its main branch. rendering: by
  # the chat template, or `plain` where the template rewrites earlier turns
  # (agent.chat.Chat). dtype of the computation: auto is bfloat16 on
  # accelerators and float32 on CPU; master weights are float32. attention: of
  # whole rows, in scoring and update; auto is the kernel of the platform.
  c.model = dict(
    path='',
    revision='',
    rendering='template',
    dtype='auto',
    remat=False,
    attention='auto',
  )

  # The keyword arguments of agent.games.Limits; a mixture has turns,
  # max_actions and action_budget in its own sections.
  c.limits = dict(
    **env_schema.limits('' if is_mixture else env),
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

  # learner.step.Recipe: one section per stage.
  # selection: algorithm.selection.keep_groups; after `patience` steps in a row
  # without a group that has spread, training stops.
  c.selection = dict(ratio=1.0, rule='top_k', patience=20)

  # scheme: `action` weighs by alpha, beta and the signal, `top_entropy` keeps
  # the `share` of tokens of the highest entropy. alpha and beta move in a
  # straight line to alpha_end and beta_end within schedule_steps, if these are
  # set.
  c.weights = dict(
    scheme='action',
    **WEIGHTS['actfocus'],
    alpha_end=config_dict.placeholder(float),
    beta_end=config_dict.placeholder(float),
    schedule_steps=0,
    share=0.2,
  )

  # estimator: `auto` is group_relative for grpo and gae for ppo. Below it the
  # numbers of each.
  c.advantage = dict(
    estimator='auto',
    **{name: dict(numbers) for name, numbers in ESTIMATORS.items()},
  )
  # dual_clip: 0 is off.
  c.loss = dict(
    clip_low=0.2,
    clip_high=0.28,
    dual_clip=3.0,
    reduction='weighted_token_mean',
  )
  c.entropy_coefficient = 0.001
  c.kl = dict(coefficient=0.0, estimator='k1')  # to the reference, as a loss

  # Of PPO: the clip of losses.value_loss, the steps in which the critic learns
  # alone, and its own learner.state.optimizer.
  c.critic = dict(clip=0.5, warmup=0, optimizer=_optimizer(learning_rate=1e-5))

  # minibatch: trajectories an optimizer step; microbatch: trajectories a
  # forward and backward pass (0: the minibatch). old_logprob: the sampler's
  # own log-probs, or those of a fresh forward pass; with importance_cap the
  # loss of a token is multiplied by their ratio, at most the cap. ratio: of a
  # token, or of its whole turn (the mean of its log-ratios). fused: one program
  # for scoring and update, or two that time apart. self_check: the first batch
  # of a run must pass learner.self_check.
  c.learner = dict(
    minibatch=32,
    microbatch=0,
    epochs=1,
    old_logprob='rescore',
    importance_cap=config_dict.placeholder(float),
    ratio='token',
    fused=True,
    self_check=True,
    score_chunk=512,
  )

  # learner.state.optimizer: AdamW with clipping by global norm.
  c.optimizer = _optimizer(learning_rate=1e-6)

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
  # parallel.mesh.make_mesh: sizes inside a slice, and over slices (dcn_*). One
  # of each kind may be -1, what the others leave.
  c.mesh = dict(MESH)

  # The scripted player of the demonstrations: envs.players.PLAYERS[env][name],
  # its fields replaced by player.options, or 'package.module:Class'.
  c.player = env_schema.player('' if is_mixture else env)

  # The keyword arguments of base_model.WarmStart: the small default model,
  # made once for each content of env, limits, player and this section, and
  # kept in `cache`.
  c.warm_start = dict(
    cache='runs/warm_starts',
    episodes=2048,
    steps=300,
    batch=32,
    learning_rate=4e-3,
    observation_weight=0.0,
    vocab_size=768,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=1,
    seed=0,
  )
  return c


def _optimizer(*, learning_rate: float) -> dict[str, Any]:
  return dict(
    learning_rate=learning_rate,
    warmup_steps=0,
    b1=0.9,
    b2=0.999,
    weight_decay=0.01,
    clip_norm=1.0,
  )


def has_reference(c: ConfigDict) -> bool:
  """Whether anything asks the frozen reference: else it is not even read."""
  if c.kl.coefficient:
    return True
  return has_signal(c) and c.weights.signal not in WITHOUT_REFERENCE


def has_signal(c: ConfigDict) -> bool:
  """Whether the token weights read the signal: beta is or becomes above 0."""
  return c.weights.scheme == 'action' and any(
    (c.weights.beta, c.weights.beta_end or 0.0)
  )


def estimator(c: ConfigDict) -> str:
  """The name of the advantage estimator; `auto` is the algorithm's first."""
  name = c.advantage.estimator
  return ESTIMATORS_OF[c.algo][0] if name == 'auto' else name


def has_field(c: ConfigDict, field: str) -> bool:
  """Whether the algorithm and the estimator of a config have a field."""
  section, *rest = field.split('.')
  if section == 'advantage' and len(rest) > 1:
    return rest[0] == estimator(c)
  return section != 'critic' or c.algo == 'ppo'


def skips_without_spread(c: ConfigDict) -> bool:
  """Whether a step is skipped in which no kept group has spread.

  PPO learns from every episode, unless groups are chosen by their spread.
  """
  chooses = c.selection.ratio < 1 or c.selection.rule == 'top_p'
  return c.algo == 'grpo' or chooses


def schema_of(c: ConfigDict) -> ConfigDict:
  """The defaults of the environments of a config."""
  if c.env.name == env_schema.MIXTURE:
    return defaults({part.name: part.share for part in c.mixture.values()})
  return defaults(c.env.name)


def parse_argument(
  text: str | None,
  *,
  free: Mapping[str, str] | None = None,
  **allowed: Sequence[str],
) -> dict[str, str]:
  """Reads the part of `--config=FILE:key=value,...` after the colon.

  Args:
    text: That part, or None.
    free: The default of each key that takes any value.
    **allowed: The values of each key; the first is the default.

  Returns:
    One value for every key.

  Raises:
    UsageError: For an unknown key or value.
  """
  chosen = {key: values[0] for key, values in allowed.items()} | dict(
    free or {}
  )
  for piece in filter(None, (text or '').split(',')):
    key, _, value = piece.partition('=')
    if key not in chosen:
      raise UsageError(
        f'Config argument {key!r} is unknown; allowed: {", ".join(chosen)}.'
      )
    if key in allowed and value not in allowed[key]:
      raise UsageError(
        f'Config argument {key} is {value!r}; allowed: '
        f'{", ".join(allowed[key])}.'
      )
    chosen[key] = value
  return chosen


# --- Fields by their dotted names --------------------------------------------


def flatten(c, prefix: str = '') -> dict[str, Any]:
  """All leaf fields by dotted name; tuples count as leaves."""
  flat = {}
  for key in c:
    value = c[key]
    if isinstance(value, (ConfigDict, dict)):
      flat.update(flatten(value, f'{prefix}{key}.'))
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def get(c: ConfigDict, field: str):
  """The value of a dotted name."""
  for name in field.split('.'):
    c = c[name]
  return c


def unknown_field(field: str, known: Iterable[str]) -> str:
  """The sentence about a field that is not there, with what may be meant."""
  known, has = list(known), ''
  section, _, name = field.rpartition('.')
  near = difflib.get_close_matches(field, known, n=3, cutoff=0.5)
  if section.endswith('options'):  # Those of each environment and player.
    names = {f: f.rpartition('.')[2] for f in known if '.options.' in f}
    there = [n for f, n in names.items() if f.startswith(f'{section}.')]
    has = f'; {section} has {", ".join(there) or "none"}'
    alike = [name] if there else difflib.get_close_matches(name, names.values())
    near = [f for f, n in names.items() if n in alike]
  hint = f'; did you mean {" or ".join(near)}?' if near else '.'
  return f'{field} is no field of the config{has}{hint}'


def to_json(c: ConfigDict) -> dict[str, Any]:
  """The config as plain, sorted JSON values."""
  return {
    key: list(value) if isinstance(value, tuple) else value
    for key, value in sorted(flatten(c).items())
  }


def from_json(flat: dict[str, Any]) -> ConfigDict:
  """The config that `to_json` wrote down.

  Args:
    flat: Values by dotted name.

  Returns:
    The config, locked.

  Raises:
    UsageError: For a field that this version does not have.
  """
  env = flat.get('env.name', 'frozen_lake')
  if env == env_schema.MIXTURE:
    parts = [
      f.removesuffix('.share')
      for f in flat
      if f.startswith('mixture.') and f.endswith('.share') and f.count('.') == 2
    ]
    env = {flat[f'{part}.name']: flat[f'{part}.share'] for part in parts}
  c = defaults(env)
  known = flatten(c)
  for field, value in flat.items():
    section, _, name = field.rpartition('.')
    if field not in known:
      raise UsageError(f'config.json has {field}, which is no field.')
    parent = get(c, section) if section else c
    parent[name] = tuple(value) if isinstance(value, list) else value
  return c.lock()
