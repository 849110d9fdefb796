"""The command line: errors at once; with libtpu, a whole answer."""

import importlib.util
import json
import subprocess
import sys

import processes
import pytest

CONFIG = '--config=configs/sokoban.py:size=0.5b'


IS_HERE = importlib.util.find_spec('libtpu') is not None
# Else that of the README.
BESIDE = processes.ROOT / '.venv-tpu'
WITH_LIBTPU = sys.executable if IS_HERE else BESIDE / 'bin' / 'python'
HAS_LIBTPU = IS_HERE or any(BESIDE.glob('lib/python*/site-packages/libtpu'))


def aot(*arguments, python=sys.executable):
  return subprocess.run(
    [str(python), '-m', 'actfocus_jax.aot', *arguments],
    cwd=processes.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    ((CONFIG,), '--topology is missing'),
    ((CONFIG, '--topology=v5e:3x3'), 'the nearest is v5e:'),
    (('--topology=v5e:4x4',), '--config is missing'),
    (
      (CONFIG, '--topology=v5e:4x4', '--response_tokens=500'),
      '--response_tokens is 500; allowed: 1 to 400.',
    ),
    (
      (CONFIG, '--scale', '--topology=v5e:4x4'),
      '--topology is given, but --scale does not read it',
    ),
    (('--scale',), '--config is missing'),
    (
      (CONFIG, '--topology=v5e:4x4', '--json=configs'),
      '--json is configs, which is a directory',
    ),
    (
      (CONFIG, '--topology=v5e:4x4', '--config.model.path=some/model'),
      "model.path is 'some/model'; allowed: Qwen/",
    ),
  ],
)
def test_command_refuses_bad_input_in_one_sentence(arguments, sentence):
  done = aot(*arguments)
  assert done.returncode == 2 and not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and sentence in line


@pytest.mark.skipif(IS_HERE, reason='libtpu is installed')
def test_command_without_libtpu_names_its_package():
  done = aot(CONFIG, '--topology=v5e:2x2')
  assert done.returncode == 2 and not done.stdout
  assert 'pip install "jax[tpu]"' in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason='no .venv-tpu with libtpu is here')
def test_command_compiles_for_an_absent_slice(tmp_path):
  file = tmp_path / 'not yet there' / 'found.json'
  done = aot(
    '--config=configs/quickstart.py',
    '--config.model.dtype=bfloat16',
    '--topology=v5e:2x2',
    '--prompt_tokens=100',
    f'--json={file}',
    python=WITH_LIBTPU,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(file.read_text())
  assert found['fits'] and found['chips'] == 4
  assert 15e9 < found['memory']['usable'] < 17.2e9
  for word in ('Fits', 'at least', 'Assumed: episodes', 'compact'):
    assert word in done.stdout
  update = found['programs'][-1]
  assert update['name'] == 'update, length 512' and update['flops'] > 1e10
  sums = [c for c in update['collectives'] if c['kind'] == 'all-reduce']
  assert sums and sums[0]['count'] >= 1 and sums[0]['sent'] > 0
