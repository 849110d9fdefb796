"""Finding a model directory, on disk and on the hub, and looking at it."""

import fnmatch
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from actfocus_jax.model import architecture, files

COMMIT = 'c' * 40
RAW = architecture.Config(96, 32, 48, 2, 4, 2, 8).to_hf()


@pytest.fixture
def model(tmp_path):
  """A directory that passes; its weights are nobody's."""
  path = tmp_path / 'model'
  path.mkdir()
  (path / 'config.json').write_text(json.dumps(RAW))
  (path / 'tokenizer.json').write_text('{"model": {}}')
  tensors = {'a': np.ones((2, 3), np.float32), 'b': np.ones(4, np.float16)}
  safetensors.numpy.save_file(tensors, path / files.WEIGHTS)
  return path


# --- Looking at it -----------------------------------------------------------


def test_check_accepts_a_complete_directory(model):
  assert files.check(model) == architecture.Config.from_hf(RAW)
  file = model / files.WEIGHTS
  assert files.tensors(model) == {
    'a': files.Tensor(file, 'F32', (2, 3)),
    'b': files.Tensor(file, 'F16', (4,)),
  }


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('config.json', None, 'lacks config.json; allowed: a Hugging Face model'),
    ('config.json', '{torn', 'config.json cannot be read'),
    ('config.json', '{"model_type": "bert"}', "model_type='bert'; only"),
    ('tokenizer.json', '{}', 'describes no model'),
    ('model.safetensors', None, 'lacks model.safetensors .or shards'),
    ('model.safetensors', 'version https://git-lfs', 'git lfs pull'),
    ('model.safetensors', 'Not Found', 'was the download cut'),
    ('model.safetensors.index.json', '{}', 'holds both'),
  ],
)
def test_incomplete_directory_is_refused(model, name, content, message):
  if content is None:
    (model / name).unlink()
  else:
    (model / name).write_text(content)
  with pytest.raises(ValueError, match=message) as raised:
    files.check(model)
  assert str(model) in str(raised.value)
  assert '\n' not in str(raised.value)


def test_stop_ids_of_a_generation_config(tmp_path):
  assert files.stop_ids(tmp_path) == ()
  file = tmp_path / 'generation_config.json'
  for named, ids in ((None, ()), (0, (0,)), ([7, 2], (7, 2))):
    file.write_text(json.dumps({'eos_token_id': named}))
    assert files.stop_ids(tmp_path) == ids
  file.write_text('{"eos_token_id": [true]}')
  with pytest.raises(ValueError, match='generation_config.json'):
    files.stop_ids(tmp_path)


def test_index_with_paths_outside_is_refused(model):
  (model / files.WEIGHTS).rename(model / 'one.safetensors')
  for file in ('../model/one.safetensors', '/etc/passwd', 7, ''):
    (model / files.INDEX).write_text(json.dumps({'weight_map': {'a': file}}))
    with pytest.raises(ValueError, match='weight_map from tensors to files'):
      files.tensors(model)


def test_fingerprint_changes_with_each_deciding_file(model, tmp_path):
  for name in (
    *('tokenizer_config.json', 'generation_config.json', 'merges.txt'),
    'chat_template.jinja',
  ):
    (model / name).write_text('{}')
  before = files.fingerprint(model)
  moved = tmp_path / 'moved'
  shutil.copytree(model, moved)
  # None of these changes what the model says.
  for name in ('README.md', 'optimizer.pt', 'LICENSE', 'other.safetensors'):
    (moved / name).write_text('new')
  assert files.fingerprint(moved) == before
  for file in model.iterdir():
    copy = tmp_path / f'without-{file.name}'
    shutil.copytree(model, copy)
    whole = (copy / file.name).read_bytes()
    # The last number of the last tensor, or a space.
    changed = (
      whole[:-1] + b'\x01' if file.suffix == '.safetensors' else (whole + b' ')
    )
    (copy / file.name).write_bytes(changed)
    assert files.fingerprint(copy) != before, file.name


# --- Finding it --------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch):
  """An empty cache and no network; returns the cache."""
  from huggingface_hub import constants

  files.locate.cache_clear()
  cache = tmp_path / 'hub'
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  yield cache
  files.locate.cache_clear()


def test_a_directory_is_taken_as_it_is(model, offline):
  assert files.locate(str(model)) == model
  with pytest.raises(ValueError, match="revision is 'v1', but model.path is a"):
    files.locate(str(model), 'v1')
  with pytest.raises(
    ValueError, match='neither a directory nor a Hugging Face'
  ):
    files.locate('no/such/dir')


def test_offline_the_error_says_what_to_do(offline):
  with pytest.raises(ValueError) as raised:
    files.locate('Qwen/Qwen2.5-0.5B-Instruct', 'v2')
  message = str(raised.value)
  for words in (
    "model.path is 'Qwen/Qwen2.5-0.5B-Instruct'",
    str(offline),
    'hf download Qwen/Qwen2.5-0.5B-Instruct',
    '--revision v2',
    '--local-dir models/Qwen2.5-0.5B-Instruct',
    '--config.model.path=models/Qwen2.5-0.5B-Instruct',
  ):
    assert words in message
  assert '\n' not in message


def test_hub_id_downloads_a_models_files_at_a_revision(offline, monkeypatch):
  """A snapshot of the hub's cache; its commit is the directory's name."""
  import huggingface_hub

  def download(name, *, revision, allow_patterns):
    assert (name, revision) == ('someone/tiny-model', 'v2')
    names = ['config.json', 'model-1.safetensors', 'merges.txt', 'a.bin']
    kept = [
      name
      for name in names
      if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
    ]
    assert kept == names[:-1]
    return str(offline / 'models--a--b' / 'snapshots' / COMMIT)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  found = files.locate('someone/tiny-model', 'v2')
  assert files.commit(found) == COMMIT
  assert files.commit(offline / 'models' / 'b') == ''
