"""From a config to the parts of a run: one small function per part.

What is played is made by `casting`, who learns by `recipe`.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import safetensors

from actfocus_jax import casting, errors, sizes
from actfocus_jax.config import schema
from actfocus_jax.learner import state as state_lib
from actfocus_jax.model import architecture, attention, files, hf, transformer
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.parallel import processes
from actfocus_jax.rollout import collector as collector_lib
from actfocus_jax.rollout import env_pool as env_pool_lib
from actfocus_jax.rollout import episode
from actfocus_jax.rollout import games as games_lib
from actfocus_jax.run import directory
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.warmstart import model as warm_model

ConfigDict = ml_collections.ConfigDict

# Names of the random streams below the run's root key.
ROLLOUT, UPDATE, EVALUATION = range(3)
_FIRST_PROMPTS = 32  # of each game, looked at before a model is made


def mesh(c: ConfigDict) -> jax.sharding.Mesh:
  """The mesh of the run; it cuts the batches and the model evenly."""
  return mesh_lib.make_mesh(**c.mesh, splits=sizes.splits(c))


def fit_mesh(c: ConfigDict):
  """Gives the config of a run from elsewhere a mesh for the devices here.

  Args:
    c: Keeps the mesh of the run where it fits, for a model may not go onto one
      device; otherwise it gets the default one.
  """
  try:
    mesh(c)
  except ValueError:
    with c.unlocked():
      c.mesh = dict(schema.MESH)


def chat(c: ConfigDict, path: pathlib.Path) -> chat_lib.Chat:
  """The tokenizer bridge of a model directory, with all its stop ids."""
  tokenizer, stop_ids = chat_lib.load_tokenizer(path), files.stop_ids(path)
  try:
    return chat_lib.Chat(
      tokenizer, stop_ids=stop_ids, rendering=c.model.rendering
    )
  except ValueError as error:
    raise ValueError(f'The tokenizer in {path}: {error}') from error


def collector(
  c: ConfigDict, chat, games, mesh, host
) -> collector_lib.Collector:
  """Rollouts in the shapes of the config."""
  return collector_lib.Collector(
    chat,
    games,
    mesh,
    host,
    slots=c.rollout.slots,
    decode_steps=c.rollout.decode_steps,
    observation_block=c.rollout.observation_block,
    cache_block=c.rollout.cache_block,
    ends_early=mesh_lib.slice_count(mesh, c.mesh.dcn_data, c.mesh.dcn_fsdp)
    == 1,
  )


def compute_dtype(c: ConfigDict, platform: str):
  """float32 on CPU and bfloat16 elsewhere, unless the config says."""
  if c.model.dtype != 'auto':
    return jnp.dtype(c.model.dtype)
  return jnp.dtype(jnp.float32 if platform == 'cpu' else jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Model:
  """A model directory, read when its weights are asked for.

  Attributes:
    path: The directory.
    config: The architecture.
    graphdef: Of the model, computing in `dtype`.
    dtype: Of computation, cache and frozen copies.
    mesh: Where weights go.
    attention: What whole rows are attended with, of attention.BACKENDS.
  """

  path: pathlib.Path
  config: architecture.Config
  graphdef: Any
  dtype: Any
  mesh: jax.sharding.Mesh
  attention: str = 'xla'

  def described(self) -> dict[str, str]:
    """What a run remembers of it."""
    return {
      'path': str(self.path),
      'commit': files.commit(self.path),
      'sha256': files.fingerprint(self.path),
    }

  def weights(self, param_dtype=jnp.float32):
    """Reads the weights; float32 for training, `dtype` for a reference."""
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
    where = mesh_lib.param_shardings(
      self.mesh, transformer.PARTITION_RULES, shapes
    )
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      where,
    )


def model(c: ConfigDict, path: pathlib.Path, mesh) -> Model:
  """The architecture of a model directory; its weights stay on disk."""
  return shaped(c, path, files.config(path), mesh)


def shaped(
  c: ConfigDict, path: pathlib.Path, config: architecture.Config, mesh
) -> Model:
  """A model of a known shape; only its weights are asked of the directory."""
  # Of the mesh, not of this process: it may compile for other devices.
  device = mesh.devices.flat[0]
  dtype = compute_dtype(c, device.platform)
  chosen = attention.choose(
    c.model.attention,
    device.platform,
    dtype,
    config.head_dim,
    getattr(device, 'compute_capability', ''),  # Of GPUs only.
  )
  graphdef, _ = transformer.abstract(
    config, dtype, remat=c.model.remat, attention=chosen
  )
  return Model(path, config, graphdef, dtype, mesh, chosen)


def same_model(model: Model) -> dict[str, str]:
  """Describes the model; refuses processes that read different ones.

  Args:
    model: Of this process.

  Returns:
    As of `Model.described`.

  Raises:
    UsageError: One sentence, in all processes.
  """
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
  """Reads the policy's parameters from a checkpoint, and nothing else of it.

  Args:
    model: What the run started from.
    workdir: Of the run.
    step: Of the checkpoint; None is the newest.

  Returns:
    The step and the parameters.

  Raises:
    UsageError: When the run started from another model, processes read
      different ones, or not all processes see such a checkpoint.
  """
  described = same_model(model)
  with processes.raise_everywhere():
    directory.check_model(workdir, described)
    directory.check_checkpoints(workdir, step)
  actor = state_lib.ModelState(model.abstract_weights(), None)
  wanted = state_lib.TrainState(None, None, None, actor)
  step, restored = directory.restore_part(
    workdir, wanted, step, agreed=processes.common
  )
  return step, restored.actor.params


def policy(model: Model, params) -> collector_lib.Policy:
  """The parameters resharded once into their decode layout."""
  params = mesh_lib.decode_layout(params, model.mesh, model.dtype)
  return collector_lib.Policy(model.config, model.graphdef, params, model.dtype)


# --- All of them -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parts:
  """What training and evaluation have in common."""

  mesh: jax.sharding.Mesh
  games: tuple[games_lib.Game, ...]
  chat: chat_lib.Chat
  model: Model
  collector: collector_lib.Collector


@contextlib.contextmanager
def parts(c: ConfigDict) -> Iterator[Parts]:
  """Everything up to the first rollout; the mesh is set inside.

  Where the config names no model, the warm start is made first if need be.

  Args:
    c: A checked config.

  Yields:
    The parts.

  Raises:
    UsageError: When the parts do not fit each other; no run has been touched
      then.
  """
  with casting.host(c) as pool:
    with processes.raise_everywhere():
      whole = _parts(c, pool)
    with jax.set_mesh(whole.mesh):
      yield whole


def _parts(c: ConfigDict, pool: env_pool_lib.EnvPool) -> Parts:
  """Everything up to the first rollout, without a word to other processes."""
  with refusing_misfits():
    made, played = mesh(c), casting.games(c)
    check_first_prompts(c, played, pool)
  # Every process makes the small model for itself, unless it finds it made.
  path = model_path(c, played, pool)
  with jax.set_mesh(made), refusing_misfits():
    bridge, wanted = chat(c, path), model(c, path, made)
    check_fit(c, bridge, wanted.config)
    collects = collector(c, bridge, played, made, pool)
    return Parts(made, played, bridge, wanted, collects)


@contextlib.contextmanager
def refusing_misfits() -> Iterator[None]:
  """What the parts raise as ValueError while they are made is bad input."""
  try:
    yield
  except ValueError as error:
    raise errors.UsageError(str(error)) from error


def check_fit(c: ConfigDict, chat: chat_lib.Chat, config: architecture.Config):
  """Raises ValueError where model, tokenizer and limits do not go together."""
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


def model_path(
  c: ConfigDict, played=None, pool: env_pool_lib.EnvPool | None = None
) -> pathlib.Path:
  """`model.path`, or the warm start that the config describes."""
  if c.model.path:
    return files.locate(c.model.path, c.model.revision)
  return warm_model.ensure(warm_start(c, played, pool))


def warm_start(
  c: ConfigDict,
  played: Sequence[games_lib.Game] | None = None,
  pool: env_pool_lib.EnvPool | None = None,
) -> warm_model.WarmStart:
  """The plan of the small default model.

  Args:
    c: The config.
    played: The games, if they have been made: a shop or a file of boards takes
      its time.
    pool: Where they run, if that has been made.

  Returns:
    The plan.
  """
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
        played or casting.games(c),
        [casting.player(section) for section in sections],
        strict=True,
      )
    ),
    pool=pool or casting.host(c),
    **c.warm_start,
  )


def check_first_prompts(
  c: ConfigDict, played: Sequence[games_lib.Game], pool: env_pool_lib.EnvPool
):
  """Refuses a context that a first prompt fills, before a model is made.

  A reset that fails has no prompt to look at; an environment of which every
  one fails is refused too.

  Args:
    c: The config.
    played: The games.
    pool: Where they run.

  Raises:
    ValueError: One sentence.
  """
  bridge = _early_chat(c, played, pool)
  seeds = range(c.eval.first_seed, c.eval.first_seed + c.eval.prompts)
  seeds = seeds[:_FIRST_PROMPTS]
  for game in played:
    openings = episode.open_all(bridge, pool, [game] * len(seeds), seeds)
    for opening in openings:
      if not opening.failure:
        collector_lib.check_opening(opening)
    if all(opening.failure for opening in openings):
      raise ValueError(
        f'{game.name}: the environment failed to reset with each of the seeds '
        f'{seeds[0]} to {seeds[-1]}, first: {openings[0].failure.reason}'
      )


def _early_chat(
  c: ConfigDict, played: Sequence[games_lib.Game], pool: env_pool_lib.EnvPool
) -> chat_lib.Chat:
  """The tokenizer bridge before there is a model to read it from."""
  if c.model.path:
    return chat(c, files.locate(c.model.path, c.model.revision))
  plan = warm_start(c, played, pool)
  if plan.directory.exists():
    return chat(c, plan.directory)
  return chat_lib.Chat(warm_model.tokenizer(plan))
