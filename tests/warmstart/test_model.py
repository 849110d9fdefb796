"""The warm start: a Hugging Face directory, named by what it is made from."""

import threading

import jax
import numpy as np
import pytest
import transformers

from actfocus_jax import build
from actfocus_jax.config import presets, schema
from actfocus_jax.model import hf
from actfocus_jax.run import locks
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.warmstart import demonstrations
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


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  c = config(tmp_path_factory.mktemp('cache'))
  mesh = build.mesh(c)
  with jax.numpy_dtype_promotion('standard'):
    path = warm_model.ensure(build.warm_start(c))
  return c, mesh, path


def test_warm_start_is_a_hugging_face_directory(made):
  _, mesh, path = made
  assert transformers.AutoConfig.from_pretrained(path).model_type == 'qwen2'
  names = {file.name for file in path.iterdir()}
  assert {'config.json', 'model.safetensors', 'tokenizer.json'} <= names
  config, _, params = hf.load(path, mesh, dtype=np.float32)
  assert config.hidden_size == 32
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_saved_tokenizer_encodes_demonstrations_equally(made):
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


def test_warm_start_is_made_once(made):
  c, _, path = made
  file = path / 'model.safetensors'
  before = file.stat()
  assert warm_model.ensure(build.warm_start(c)) == path
  assert file.stat() == before


def test_ensure_waits_for_the_same_warm_start_only(tmp_path, monkeypatch):
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


def test_directory_name_follows_the_content(made, tmp_path):
  c, _, path = made
  name = build.warm_start(config(c.warm_start.cache)).directory.name
  assert name == path.name
  elsewhere = build.warm_start(config(tmp_path)).directory
  assert elsewhere.parent == tmp_path
  assert elsewhere.name == name
  others = [config(tmp_path) for _ in range(5)]
  others[0].warm_start.seed = 1
  others[1].player.options.skill = 0.9
  others[2].limits.turns = 3
  others[3].env.options.success_probability = 0.8
  others[4].env.options.instructions = 'Reach G.'
  names = {build.warm_start(other).directory.name for other in others}
  assert len(names | {name}) == 6
