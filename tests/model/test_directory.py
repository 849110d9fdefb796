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

from actfocus_jax.model import architecture, directory

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
  safetensors.numpy.save_file(tensors, path / directory.WEIGHTS)
  return path


# --- Looking at it -----------------------------------------------------------


def test_a_whole_directory(model):
  assert directory.check(model) == architecture.Config.from_hf(RAW)
  file = model / directory.WEIGHTS
  assert directory.tensors(model) == {
    'a': directory.Tensor(file, 'F32', (2, 3)),
    'b': directory.Tensor(file, 'F16', (4,)),
  }


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('config.json', None, 'lacks config.json; allowed: a Hugging Face model'),
    ('config.json', '{torn', 'config.json cannot be read'),
    ('config.json', '[]', 'holds no JSON object'),
    ('config.json', '{"model_type": "bert"}', "model_type='bert'; only"),
    ('tokenizer.json', None, 'lacks tokenizer.json'),
    ('tokenizer.json', '{}', 'describes no model'),
    ('model.safetensors', None, 'lacks model.safetensors .or shards'),
    ('model.safetensors', '', 'no whole safetensors file, with 0 bytes'),
    ('model.safetensors', 'version https://git-lfs', 'was the download cut'),
    ('model.safetensors.index.json', '{}', 'holds both'),
  ],
)
def test_what_is_not_whole_is_refused(model, name, content, message):
  if content is None:
    (model / name).unlink()
  else:
    (model / name).write_text(content)
  with pytest.raises(ValueError, match=message) as raised:
    directory.check(model)
  assert str(model) in str(raised.value)
  assert '\n' not in str(raised.value)


def test_a_file_that_was_cut(model):
  file = model / directory.WEIGHTS
  whole = file.read_bytes()
  for size in (len(whole) - 1, 20, 8, 7):
    file.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=f'with {size} bytes'):
      directory.check(model)
  file.write_bytes(whole)
  directory.check(model)


def test_an_index_that_promises_too_much(model):
  (model / directory.WEIGHTS).rename(model / 'one.safetensors')
  index = {'weight_map': {'a': 'one.safetensors', 'b': 'one.safetensors'}}
  (model / directory.INDEX).write_text(json.dumps(index))
  assert directory.tensors(model).keys() == {'a', 'b'}
  index['weight_map']['c'] = 'one.safetensors'
  (model / directory.INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match='tensor c is missing from'):
    directory.tensors(model)
  (model / directory.INDEX).write_text('{}')
  with pytest.raises(ValueError, match='has no weight_map'):
    directory.tensors(model)


# --- Finding it --------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch):
  """An empty cache and no network; returns the cache."""
  from huggingface_hub import constants

  directory.locate.cache_clear()
  cache = tmp_path / 'hub'
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  yield cache
  directory.locate.cache_clear()


def test_a_directory_is_taken_as_it_is(model, offline):
  assert directory.locate(str(model)) == model
  with pytest.raises(ValueError, match="revision is 'v1', but model.path is a"):
    directory.locate(str(model), 'v1')


@pytest.mark.parametrize('path', ['no/such/dir', '/no/dir', './x/y', 'gpt2'])
def test_neither_directory_nor_hub_id(path, offline):
  with pytest.raises(ValueError, match='no directory and no hub id; allowed'):
    directory.locate(path)


def test_offline_the_error_says_what_to_do(offline):
  with pytest.raises(ValueError) as raised:
    directory.locate('Qwen/Qwen2.5-0.5B-Instruct', 'v2')
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
    'from actfocus_jax.model import directory\n'
    'try:\n'
    '  found = directory.locate(sys.argv[1])\n'
    '  directory.check(found)\n'
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
  files = {file.name: file.read_bytes() for file in model.iterdir()}
  files |= {'pytorch_model.bin': b'not this', 'merges.txt': b'a b'}
  shutil.rmtree(model)
  home = tmp_path / 'home'
  with hub(files) as endpoint:
    found = pathlib.Path(locate_apart(NAME, endpoint, home))
    assert home in found.parents and found.name == COMMIT
    assert {p.name for p in found.iterdir()} == files.keys() - {
      'pytorch_model.bin'
    }
    assert (found / 'merges.txt').read_bytes() == b'a b'
    assert not any('pytorch_model' in path for path in _Hub.asked)
    missing = locate_apart('someone/else', endpoint, home)
    assert "model.path is 'someone/else'" in missing
    assert 'cannot be downloaded' in missing and 'hf download' in missing
  # The server is gone now; the cache is not.
  assert locate_apart(NAME, endpoint, home) == str(found)
