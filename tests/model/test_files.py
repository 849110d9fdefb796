"""Finding a model directory, on disk and on the hub, and looking at it."""

import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.numpy

from actfocus_jax.model import architecture, files

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAME, COMMIT = 'someone/tiny-model', 'c' * 40
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
    ('config.json', '[]', 'not hold a JSON object'),
    ('config.json', '{"model_type": "bert"}', "model_type='bert'; only"),
    ('tokenizer.json', None, 'lacks tokenizer.json'),
    ('tokenizer.json', '{}', 'describes no model'),
    ('model.safetensors', None, 'lacks model.safetensors .or shards'),
    ('model.safetensors', '', 'not a complete safetensors file, with 0 bytes'),
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


@pytest.mark.parametrize(
  ('content', 'ids'),
  [
    (None, ()),
    ({}, ()),
    ({'eos_token_id': None}, ()),
    ({'eos_token_id': []}, ()),
    ({'eos_token_id': 0}, (0,)),
    ({'eos_token_id': [7, 2]}, (7, 2)),
  ],
)
def test_stop_ids_of_a_generation_config(content, ids, tmp_path):
  if content is not None:
    file = tmp_path / 'generation_config.json'
    file.write_text(json.dumps(content))
  assert files.stop_ids(tmp_path) == ids


@pytest.mark.parametrize(
  'text', ['{', '[]', '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}']
)
def test_a_bad_generation_config_is_refused(text, tmp_path):
  (tmp_path / 'generation_config.json').write_text(text)
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


def test_the_commit_of_a_snapshot(tmp_path):
  snapshot = tmp_path / 'models--a--b' / 'snapshots' / COMMIT
  assert files.commit(snapshot) == COMMIT
  assert files.commit(tmp_path / 'models' / 'b') == ''


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


@pytest.mark.parametrize('path', ['no/such/dir', '/no/dir', './x/y', 'gpt2'])
def test_neither_directory_nor_hub_id(path, offline):
  with pytest.raises(
    ValueError, match='neither a directory nor a Hugging Face hub id; allowed'
  ):
    files.locate(path)


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


class _Hub(http.server.BaseHTTPRequestHandler):
  """As much of the hub as a download needs: one model at one commit."""

  files: dict[str, bytes] = {}
  asked: list[str] = []

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    path = self.path.partition('?')[0]
    self.asked.append(path)
    name = path.removeprefix(f'/{NAME}/resolve/{COMMIT}/')
    if path.startswith(f'/api/models/{NAME}/tree/{COMMIT}'):
      self._send(
        json.dumps([self._entry(name) for name in self.files]).encode()
      )
    elif path == f'/api/models/{NAME}/revision/main':
      self._send(json.dumps({'id': NAME, 'sha': COMMIT}).encode())
    elif name in self.files:
      self._send(self.files[name])
    else:
      self.send_response(404)
      self.send_header('X-Error-Code', 'RepoNotFound')
      self.send_header('Content-Length', '0')
      self.end_headers()

  def _entry(self, name):
    size = len(self.files[name])
    oid = hashlib.sha1(self.files[name]).hexdigest()
    return {'type': 'file', 'path': name, 'size': size, 'oid': oid}

  def _send(self, content):
    self.send_response(200)
    self.send_header('Content-Length', str(len(content)))
    self.send_header('ETag', f'"{hashlib.sha1(content).hexdigest()}"')
    self.send_header('X-Repo-Commit', COMMIT)
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(content)


@contextlib.contextmanager
def hub(files):
  """Serves files as a model; yields its address."""
  _Hub.files, _Hub.asked = files, []
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Hub)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}'
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def locate_apart(name, endpoint, home):
  """`locate` in a process of its own: the hub's address is read at import."""
  code = (
    'import sys\n'
    'from actfocus_jax.model import files\n'
    'try:\n'
    '  found = files.locate(sys.argv[1])\n'
    '  files.check(found)\n'
    'except ValueError as error:\n'
    '  found = error\n'
    'print(found)\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', code, name],
    cwd=ROOT,
    env={**os.environ, 'HF_ENDPOINT': endpoint, 'HF_HOME': str(home)},
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  return result.stdout.strip()


def test_a_hub_id_is_downloaded_once_and_found_offline(model, tmp_path):
  served = {file.name: file.read_bytes() for file in model.iterdir()}
  served |= {'pytorch_model.bin': b'not this', 'merges.txt': b'a b'}
  shutil.rmtree(model)
  home = tmp_path / 'home'
  with hub(served) as endpoint:
    found = pathlib.Path(locate_apart(NAME, endpoint, home))
    assert home in found.parents and found.name == COMMIT
    assert {p.name for p in found.iterdir()} == served.keys() - {
      'pytorch_model.bin'
    }
    assert (found / 'merges.txt').read_bytes() == b'a b'
    assert not any('pytorch_model' in path for path in _Hub.asked)
    missing = locate_apart('someone/else', endpoint, home)
    assert "model.path is 'someone/else'" in missing
    assert 'cannot be downloaded' in missing and 'hf download' in missing
  # The server is gone now; the cache is not.
  assert locate_apart(NAME, endpoint, home) == str(found)
