"""The warm start: a directory like any other, named by what it is made from."""

import dataclasses
import inspect
import shutil
import threading

import jax
import numpy as np
import pytest
import transformers

from actfocus_jax import build, casting, envs
from actfocus_jax.config import env_schema, presets, schema
from actfocus_jax.model import hf
from actfocus_jax.run import locks
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.warmstart import demonstrations, players
from actfocus_jax.warmstart import model as warm_model


def config(cache, **warm_start):
  c = schema.defaults()
  presets.tiny(c)
  c.env.options.success_probability = 1.0
  c.warm_start.update(
    cache=str(cache),
    episodes=16,
    steps=2,
    batch=8,
    hidden_size=32,
    intermediate_size=32,
    **warm_start,
  )
  return c


def section(c):
  return env_schema.sections(c)[0]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  c = config(tmp_path_factory.mktemp('cache'))
  mesh = build.mesh(c)
  with jax.numpy_dtype_promotion('standard'):
    path = warm_model.ensure(build.warm_start(c))
  return c, mesh, path


def test_it_is_a_hugging_face_directory(made):
  _, mesh, path = made
  assert transformers.AutoConfig.from_pretrained(path).model_type == 'qwen2'
  names = {file.name for file in path.iterdir()}
  assert {'config.json', 'model.safetensors', 'tokenizer.json'} <= names
  config, _, params = hf.load(path, mesh, dtype=np.float32)
  assert config.hidden_size == 32
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_its_tokenizer_reads_demonstrations_as_they_were_written(made):
  c, _, path = made
  plan = build.warm_start(c)
  written = chat_lib.Chat(warm_model.tokenizer(plan))
  loaded = build.chat(c, path)
  episodes = demonstrations.play(written, plan.cast, range(5))
  for episode in episodes:
    text = written.text(episode.ids)
    again = transformers.AutoTokenizer.from_pretrained(path).encode(text)
    assert again == episode.ids
    assert loaded.text(episode.ids) == text


def test_it_is_made_on_one_device_of_many(tmp_path, monkeypatch):
  """So it is the same on every mesh: a sum over devices rounds otherwise."""

  class Seen(Exception):
    pass

  def device_set(x):
    return frozenset(x.sharding.device_set)

  def look(graphdef, tx, state, *rows, **_):
    del graphdef, tx
    raise Seen({device_set(x) for x in jax.tree.leaves((state, rows))})

  monkeypatch.setattr(warm_model.supervised, 'step', look)
  assert jax.device_count() > 1
  with jax.numpy_dtype_promotion('standard'), pytest.raises(Seen) as seen:
    warm_model.ensure(build.warm_start(config(tmp_path)))
  (devices,) = seen.value.args[0]
  assert len(devices) == 1


def test_it_is_made_once(made, monkeypatch):
  c, _, path = made

  def fail(*_):
    raise AssertionError('made a second time')

  monkeypatch.setattr(warm_model, 'make', fail)
  assert warm_model.ensure(build.warm_start(c)) == path


def test_only_the_same_warm_start_is_waited_for(tmp_path, monkeypatch):
  monkeypatch.setattr(warm_model, 'make', lambda plan, path: path.mkdir())
  here = build.warm_start(config(tmp_path))
  other = build.warm_start(config(tmp_path, seed=1))
  waiting = threading.Thread(target=warm_model.ensure, args=(here,))
  with locks.lock_file(here.directory.with_suffix('.lock'), wait=False):
    waiting.start()
    warm_model.ensure(other)
    waiting.join(0.2)
    assert waiting.is_alive() and not here.directory.exists()
  waiting.join(10)
  assert here.directory.exists() and other.directory.exists()


def test_its_name_follows_its_content(made, tmp_path):
  c, _, path = made
  name = build.warm_start(config(c.warm_start.cache)).directory.name
  assert name == path.name
  elsewhere = build.warm_start(config(tmp_path)).directory
  assert elsewhere.parent == tmp_path
  assert elsewhere.name == name
  others = [config(tmp_path) for _ in range(4)]
  others[0].warm_start.seed = 1
  others[1].player.options.skill = 0.9
  others[2].limits.turns = 3
  others[3].env.options.success_probability = 0.8
  names = {build.warm_start(other).directory.name for other in others}
  assert len(names | {name}) == 5


def test_unknown_player_and_options_are_refused(tmp_path):
  c = config(tmp_path)
  c.player.name = 'grandmaster'
  with pytest.raises(ValueError, match='player.name.*grandmaster.*careless'):
    casting.player(section(c))
  c = config(tmp_path)
  c.player.options.charm = 1.0
  with pytest.raises(ValueError, match='player.options.*charm'):
    casting.player(section(c))
  c = config(tmp_path)
  c.env.options.holes = 3
  with pytest.raises(ValueError, match='env.options.*holes'):
    casting.environment(c, section(c))


@pytest.mark.parametrize('name', env_schema.OPTIONS)
def test_options_in_the_config_are_those_of_the_environment(name):
  constructor = dict(inspect.signature(envs.ENVS[name]).parameters)
  constructor.pop('progress', None)  # A callable is no setting.
  assert env_schema.OPTIONS[name] == {
    option: '' if parameter.default is None else parameter.default
    for option, parameter in constructor.items()
  }
  for player in players.PLAYERS[name].values():
    fields = {field.name for field in dataclasses.fields(player)}
    assert fields == set(env_schema.PLAYERS[name])


def test_instructions_of_the_users_own(tmp_path):
  c = config(tmp_path)
  own = build.warm_start(c).directory
  c.env.options.instructions = 'Reach G.'
  assert casting.environment(c, section(c)).instructions == 'Reach G.'
  assert build.warm_start(c).directory != own


def test_stop_ids_of_the_generation_config(made, tmp_path):
  c, _, path = made
  model = tmp_path / 'model'
  shutil.copytree(path, model)
  before = build.chat(c, model).stop_ids
  (model / 'generation_config.json').write_text('{"eos_token_id": [0, 2]}')
  assert build.chat(c, model).stop_ids == (0, 2) != before
