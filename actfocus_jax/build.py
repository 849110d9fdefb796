"""Build the parts of a run from its config.

The only place that knows names of choices: `env.name`, `player.name` and, for
the learner, `algo`, `weights.*`, `advantage.estimator`, are looked up here, in
literal dicts. Everything below receives a section of the config or a value.
"""

import contextlib
import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import safetensors

from actfocus_jax import envs, errors
from actfocus_jax.algorithm import (
  estimators,
  selection,
  signals,
  turns,
  weights,
)
from actfocus_jax.config import plugins, presets, schema, validate
from actfocus_jax.envs import boards
from actfocus_jax.learner import state as state_lib
from actfocus_jax.learner import train_step as train_step_lib
from actfocus_jax.model import architecture, attention, files, hf, transformer
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.parallel import mesh_shapes, processes
from actfocus_jax.rollout import collector as collector_lib
from actfocus_jax.rollout import env_pool as env_pool_lib
from actfocus_jax.rollout import games as games_lib
from actfocus_jax.run import directory
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.warmstart import model as warm_model
from actfocus_jax.warmstart import players

ConfigDict = ml_collections.ConfigDict
FrozenConfigDict = ml_collections.FrozenConfigDict

# Names of the random streams below the run's root key.
ROLLOUT, UPDATE, EVALUATION = range(3)
_UNLIMITED = 10**8  # context of an episode played by hand, in tokens


@contextlib.contextmanager
def refusing_misfits() -> Iterator[None]:
  """Raise `UsageError` for a `ValueError` inside: parts that do not fit."""
  try:
    yield
  except ValueError as error:
    raise errors.UsageError(str(error)) from error


# --- Environments ------------------------------------------------------------


def games(
  c: ConfigDict, *, by_hand: bool = False
) -> tuple[games_lib.Game, ...]:
  """Environments of the run with their limits; ValueError names a bad field.

  With `by_hand` no context ends an episode, and a file may hold any number of
  boards.
  """
  return tuple(
    games_lib.Game(
      section.label,
      environment(c, section, by_hand=by_hand),
      limits(c, section, **({'context': _UNLIMITED} if by_hand else {})),
      section.share,
    )
    for section in schema.sections(c)
  )


def environment(
  c: ConfigDict, section: schema.Section, *, by_hand: bool = False
):
  """Environment of one section, on the boards of its file if it names one."""
  field = f'{section.field}.options'
  if section.name in envs.ENVS:
    options = dict(section.options)
    options['instructions'] = options['instructions'] or None
    try:
      env = envs.ENVS[section.name](**options)
    except (TypeError, ValueError) as error:
      raise ValueError(f'{field}: {str(error).rstrip(".")}.') from error
  else:
    name = f'{section.field}.name'
    env = plugins.make(name, section.name, field, section.options)
    try:
      problem = games_lib.problem(env)
    except (Exception, SystemExit) as error:  # A property may do anything.
      problem = f'cannot be read: {plugins.describe_exception(error)}'
    if problem:
      raise ValueError(f'{name} is {section.name!r}, which {problem}.')
  if not section.boards:
    if not by_hand:
      _check_evaluation_boards(c, section, env)
    return env
  return boards.OnBoards.read(
    env,
    pathlib.Path(section.boards).expanduser(),
    field=f'{section.field}.boards',
    held_out=range(c.eval.first_seed, c.eval.first_seed + c.eval.prompts),
    few=by_hand,
  )


def _check_evaluation_boards(c: ConfigDict, section: schema.Section, env):
  """Raise ValueError if an evaluation would count a board twice."""
  most = getattr(env, 'evaluation_boards', None)
  if most is not None and c.eval.prompts > most:
    raise ValueError(
      f'eval.prompts is {c.eval.prompts}, but {section.name!r} with these '
      f'{section.field}.options has {most} different boards for evaluation; '
      f'allowed: 1 to {most}.'
    )


def limits(
  c: ConfigDict, section: schema.Section, **others: int
) -> games_lib.Limits:
  """Limits of an episode; `others` override the config."""
  names = ('turns', 'max_actions', 'action_budget')
  own = {name: getattr(section, name) for name in names}
  return games_lib.Limits(**{**c.limits, **own, **others})


def player(section: schema.Section):
  """Scripted player that writes the demonstrations of one environment."""
  name, field = section.player.name, f'{section.player_field}.name'
  if ':' in name:
    made = plugins.make(field, name, f'{section.player_field}.options', {})
    if callable(getattr(made, 'respond', None)):
      return made
    raise ValueError(
      f'{field} is {name!r}, which has no method `respond`; allowed: a class '
      'with respond(env, state, rng) -> (thought, actions).'
    )
  choices = players.PLAYERS.get(section.name, players.FOR_ALL)
  if name not in choices:
    raise ValueError(
      f'{field} is {name!r}; allowed for {section.name}: {", ".join(choices)}, '
      'or package.module:Class for one of your own.'
    )
  try:
    given = {k: v for k, v in section.player.options.items() if v is not None}
    return dataclasses.replace(choices[name], **given)
  except TypeError as error:
    raise ValueError(f'{section.player_field}.options: {error}.') from error


def pool(c: ConfigDict) -> env_pool_lib.EnvPool:
  """Threads in which the environments of a run are reset and stepped."""
  return env_pool_lib.EnvPool(c.env.threads, c.env.time_limit)


# --- Model and mesh ----------------------------------------------------------


def architecture_of(
  c: ConfigDict, path: pathlib.Path | None = None
) -> architecture.Config:
  """Architecture of the model, if possible without a download.

  Without a path it is the one that the config describes or that is known of a
  hub id. That of a warm start is approximate: set phrases are added to its
  vocabulary.
  """
  if path is None and c.model.path and c.model.path not in presets.SHAPES:
    path = files.locate(c.model.path, c.model.revision)
  if path is not None:
    return files.config(path)
  if c.model.path:
    return architecture.Config(**presets.SHAPES[c.model.path])
  w = c.warm_start
  return architecture.Config(
    vocab_size=w.vocab_size,
    hidden_size=w.hidden_size,
    intermediate_size=w.intermediate_size,
    num_layers=w.num_layers,
    num_heads=w.num_heads,
    num_key_value_heads=w.num_key_value_heads,
    head_dim=w.hidden_size // w.num_heads,
  )


def splits(
  c: ConfigDict, path: pathlib.Path | None = None
) -> tuple[mesh_shapes.Split, ...]:
  """Sizes that the mesh must cut into equal parts: batches and the model."""
  model = architecture_of(c, path).splits
  if not c.model.path:  # Its vocabulary is unknown before the warm start.
    model = tuple(part for part in model if part.what != 'vocab_size')
  return mesh_shapes.row_splits(validate.mesh_rows(c)) + model


def check_mesh(c: ConfigDict, path: pathlib.Path | None = None):
  """Refuse a mesh that cannot cut batches or model on any machine."""
  with refusing_misfits():
    mesh_shapes.check(c.mesh, splits(c, path))


def mesh(c: ConfigDict) -> jax.sharding.Mesh:
  """Mesh over all devices; it cuts the batches and the model evenly."""
  return mesh_lib.make_mesh(**c.mesh, splits=splits(c))


def fit_mesh(c: ConfigDict):
  """Replace the mesh of a config by the default one if it does not fit here."""
  try:
    mesh(c)
  except ValueError:
    with c.unlocked():
      c.mesh = dict(schema.MESH)


def chat(c: ConfigDict, path: pathlib.Path) -> chat_lib.Chat:
  """Tokenizer bridge of a model directory, with all its stop ids."""
  tokenizer, stop_ids = chat_lib.load_tokenizer(path), files.stop_ids(path)
  try:
    return chat_lib.Chat(
      tokenizer, stop_ids=stop_ids, rendering=c.model.rendering
    )
  except ValueError as error:
    raise ValueError(f'The tokenizer in {path}: {error}') from error


@dataclasses.dataclass(frozen=True)
class Model:
  """A model directory; its weights are read on request.

  Attributes:
    path: the directory.
    config: the architecture.
    graphdef: structure of the model, computing in `dtype`.
    dtype: dtype of computation, cache and frozen copies.
    mesh: mesh that the weights are placed on.
    attention: backend for whole rows, one of attention.BACKENDS.
  """

  path: pathlib.Path
  config: architecture.Config
  graphdef: Any
  dtype: Any
  mesh: jax.sharding.Mesh
  attention: str = 'xla'

  def described(self) -> dict[str, str]:
    """Path, hub commit and fingerprint, as kept in model.json."""
    return {
      'path': str(self.path),
      'commit': files.commit(self.path),
      'sha256': files.fingerprint(self.path),
    }

  def weights(self, param_dtype=jnp.float32):
    """Read the weights: float32 for training, `dtype` for a reference."""
    try:
      _, _, params = hf.load(
        self.path, self.mesh, dtype=self.dtype, param_dtype=param_dtype
      )
    except (ValueError, safetensors.SafetensorError) as error:
      raise errors.UsageError(f'{self.path} cannot be read: {error}') from error
    return params

  def abstract_weights(self, *, is_critic: bool = False):
    """Shapes, dtypes and shardings of the float32 weights."""
    _, shapes = transformer.abstract(
      self.config, self.dtype, is_critic=is_critic
    )
    shardings = mesh_lib.param_shardings(
      self.mesh, transformer.PARTITION_RULES, shapes
    )
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      shardings,
    )


def model(
  c: ConfigDict,
  path: pathlib.Path,
  mesh: jax.sharding.Mesh,
  config: architecture.Config | None = None,
) -> Model:
  """Model of a directory; `config` replaces the config.json in it."""
  config = config or files.config(path)
  # The mesh may be of devices that this process does not have.
  device = mesh.devices.flat[0]
  name = c.model.dtype
  if name == 'auto':
    name = 'float32' if device.platform == 'cpu' else 'bfloat16'
  dtype = jnp.dtype(name)
  backend = attention.choose(
    c.model.attention,
    device.platform,
    dtype,
    config.head_dim,
    getattr(device, 'compute_capability', ''),  # GPUs have one.
  )
  graphdef, _ = transformer.abstract(
    config, dtype, remat=c.model.remat, attention=backend
  )
  return Model(path, config, graphdef, dtype, mesh, backend)


def same_model(model: Model) -> dict[str, str]:
  """Describe the model; refuse, in all processes, if they read another one."""
  described = model.described()
  processes.check_equal(
    described['sha256'],
    f'the sha256 of {described["path"]}',
    'the same files in all processes; a warm start can be shared by '
    'warm_start.cache, or its directory copied',
  )
  return described


def checkpoint(
  model: Model, workdir: pathlib.Path, step: int | None
) -> tuple[int, Any]:
  """Read the policy's parameters from a checkpoint, and nothing else of it.

  Args:
    model: model that the run started from.
    workdir: run directory.
    step: step of the checkpoint; None is the newest.

  Returns:
    The step and the parameters.

  Raises:
    UsageError: the run started from another model, or not all processes see
      such a checkpoint.
  """
  described = same_model(model)
  with processes.raise_everywhere():
    directory.check_model(workdir, described)
    directory.check_checkpoints(workdir, step)
  actor = state_lib.ModelState(model.abstract_weights(), None)
  wanted = state_lib.TrainState(None, None, None, actor)
  step, restored = directory.restore_part(workdir, wanted, step)
  return step, restored.actor.params


def policy(model: Model, params) -> collector_lib.Policy:
  """Parameters resharded once into their decode layout."""
  params = mesh_lib.decode_layout(params, model.mesh, model.dtype)
  return collector_lib.Policy(model.config, model.graphdef, params, model.dtype)


def model_path(
  c: ConfigDict,
  run_games: Sequence[games_lib.Game] | None = None,
  threads: env_pool_lib.EnvPool | None = None,
) -> pathlib.Path:
  """`model.path`, or the directory of the warm start, made if need be."""
  if c.model.path:
    return files.locate(c.model.path, c.model.revision)
  return warm_model.ensure(warm_start(c, run_games, threads))


def warm_start(
  c: ConfigDict,
  run_games: Sequence[games_lib.Game] | None = None,
  threads: env_pool_lib.EnvPool | None = None,
) -> warm_model.WarmStart:
  """Plan of the warm start, with games and pool of the run if it has some."""
  sections = schema.sections(c)
  described = {key: schema.to_json(c[key]) for key in ('limits', 'player')}
  described['env'] = {
    key: value
    for key, value in schema.to_json(c.env).items()
    if key not in ('threads', 'time_limit')
  }
  described['mixture'] = schema.to_json(c.mixture)
  del described['limits']['format_penalty']  # No demonstration shows it.
  return warm_model.WarmStart(
    name='-'.join(section.label for section in sections),
    described=described,
    cast=tuple(
      zip(
        run_games or games(c),
        [player(section) for section in sections],
        strict=True,
      )
    ),
    pool=threads or pool(c),
    **c.warm_start,
  )


def evaluation_key(c: ConfigDict) -> jax.Array:
  """PRNG key of every evaluation of a run."""
  return jax.random.fold_in(jax.random.key(c.seed), EVALUATION)


def held_out(c: ConfigDict) -> dict[str, Any]:
  """Keyword arguments of `evaluation.evaluate`."""
  names = ('prompts', 'members', 'temperature', 'first_seed')
  return {name: c.eval[name] for name in names}


# --- Learner ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Learners:
  """Models that learn: the policy, and with PPO a critic.

  Attributes:
    model: model that both start from.
    actor: the policy.
    critic: the critic; None without one.
  """

  model: Model
  actor: train_step_lib.Learner
  critic: train_step_lib.Learner | None

  def create(self) -> state_lib.TrainState:
    """Fresh state; both start from the model's weights."""
    params = self.model.weights()
    critic = None
    if self.critic is not None:
      shapes = self.model.abstract_weights(is_critic=True)
      critic = state_lib.create_model_state(
        transformer.critic_from(params, shapes), self.critic.tx
      )
    return state_lib.create(
      state_lib.create_model_state(params, self.actor.tx), critic
    )

  def abstract(self) -> state_lib.TrainState:
    """Shapes, dtypes and shardings of the state."""
    critic = None
    if self.critic is not None:
      shapes = self.model.abstract_weights(is_critic=True)
      critic = state_lib.abstract_model_state(shapes, self.critic.tx)
    shapes = self.model.abstract_weights()
    actor = state_lib.abstract_model_state(shapes, self.actor.tx)
    return state_lib.abstract(actor, critic)


def learners(c: ConfigDict, model: Model) -> Learners:
  """The policy and, for PPO, a critic of the same architecture."""
  critic = None
  if c.algo == 'ppo':
    graphdef, _ = transformer.abstract(
      model.config,
      model.dtype,
      remat=c.model.remat,
      attention=model.attention,
      is_critic=True,
    )
    tx = state_lib.optimizer(**c.critic.optimizer)
    critic = train_step_lib.Learner(graphdef, tx)
  tx = state_lib.optimizer(**c.optimizer)
  return Learners(model, train_step_lib.Learner(model.graphdef, tx), critic)


def train_step(c: ConfigDict, chosen: Learners) -> train_step_lib.TrainStep:
  """The compiled train step; policy and reference are one architecture."""
  return train_step_lib.TrainStep(
    chosen.actor, train_step_config(c), critic=chosen.critic
  )


def train_step_config(c: ConfigDict) -> train_step_lib.TrainStepConfig:
  """Look up the functions that the config names, and pass on its sections."""
  estimator = schema.estimator(c)
  scheme = weights.SCHEMES[c.weights.scheme]
  return train_step_lib.TrainStepConfig(
    members=c.rollout.members,
    num_turns=schema.most_turns(c),
    temperature=c.rollout.temperature,
    selection=_keyword_arguments(selection.keep_groups, c.selection),
    signal=signals.SIGNALS[c.weights.signal],
    weight_scheme=scheme,
    weights=_keyword_arguments(scheme, c.weights),
    estimator=estimators.ESTIMATORS[estimator],
    advantage=dict(c.advantage[estimator]),
    logprob_pooling=turns.LOGPROB_POOLINGS[c.learner.ratio],
    loss=dict(c.loss, dual_clip=c.loss.dual_clip or None),
    entropy_coefficient=c.entropy_coefficient,
    kl=FrozenConfigDict(c.kl),
    critic=FrozenConfigDict(c.critic) if c.algo == 'ppo' else None,
    learner=FrozenConfigDict(c.learner),
    has_reference=schema.has_reference(c),
    has_signal=schema.has_signal(c),
    needs_spread=schema.skips_without_spread(c),
  )


def _keyword_arguments(
  function: Callable, section: ConfigDict
) -> dict[str, Any]:
  """Fields that a function takes, such as `beta` of weights.by_action."""
  names = inspect.getfullargspec(function).kwonlyargs
  return {name: section[name] for name in names}


# --- All parts ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parts:
  """Parts that training and evaluation have in common."""

  mesh: jax.sharding.Mesh
  games: tuple[games_lib.Game, ...]
  chat: chat_lib.Chat
  model: Model
  collector: collector_lib.Collector


@contextlib.contextmanager
def parts(c: ConfigDict) -> Iterator[Parts]:
  """Make everything up to the first rollout; the mesh is set inside.

  A warm start is made first if the config names no model.

  Args:
    c: checked config.

  Yields:
    The parts.

  Raises:
    UsageError: the parts do not fit each other; no run has been touched.
  """
  with pool(c) as threads:
    with processes.raise_everywhere():
      made = _parts(c, threads)
    with jax.set_mesh(made.mesh):
      yield made


def _parts(c: ConfigDict, threads: env_pool_lib.EnvPool) -> Parts:
  """Make the parts without communication between processes."""
  with refusing_misfits():
    run_mesh, run_games = mesh(c), games(c)
  # Every process makes the warm start for itself unless it finds one.
  path = model_path(c, run_games, threads)
  with jax.set_mesh(run_mesh), refusing_misfits():
    bridge, base = chat(c, path), model(c, path, run_mesh)
    check_vocabulary(c, bridge, base.config)
    seeds = range(c.eval.first_seed, c.eval.first_seed + c.eval.prompts)
    collector_lib.check_first_prompts(bridge, run_games, threads, seeds)
    return Parts(
      run_mesh,
      run_games,
      bridge,
      base,
      collector(c, bridge, run_games, run_mesh, threads),
    )


def collector(
  c: ConfigDict, chat, run_games, mesh, threads
) -> collector_lib.Collector:
  """Collector of rollouts in the shapes of the config."""
  slices = mesh_lib.slice_count(mesh, c.mesh.dcn_data, c.mesh.dcn_fsdp)
  return collector_lib.Collector(
    chat,
    run_games,
    mesh,
    threads,
    slots=c.rollout.slots,
    decode_steps=c.rollout.decode_steps,
    observation_block=c.rollout.observation_block,
    cache_block=c.rollout.cache_block,
    ends_early=slices == 1,
  )


def check_vocabulary(
  c: ConfigDict, chat: chat_lib.Chat, config: architecture.Config
):
  """Raise ValueError if model, tokenizer and limits do not fit each other."""
  largest = max(*chat.tokenizer.get_vocab().values(), *chat.stop_ids)
  if largest >= config.vocab_size:
    raise ValueError(
      f'The tokenizer and its stop ids go up to id {largest}, but vocab_size '
      f'in config.json is {config.vocab_size}; allowed: ids below it.'
    )
  if c.limits.context > config.max_position_embeddings:
    raise ValueError(
      f'limits.context is {c.limits.context}; allowed: up to '
      f'{config.max_position_embeddings}, the max_position_embeddings of the '
      'model.'
    )
