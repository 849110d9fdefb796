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
    ((CONFIG, '--topology=v5e:4x4', '--reached=1,2,1'), '--reached is '),
    ((CONFIG, '--topology=v5e:4x4', '--price=-1'), '--price is -1.0'),
    (('--table',), '--out is missing'),
    (
      ('--table', '--out=x', '--topology=v5e:4x4'),
      '--topology is given, but --table does not read it; allowed: --topol',
    ),
    (('--table', '--out=x', '--json=f'), '--json is given, but --table'),
    (('--scale', '--out=x', '--sizes=3b'), '--sizes is given, but --scale'),
    ((CONFIG, '--topology=v5e:4x4', '--out=x'), '--out is given, but --topo'),
    ((CONFIG, '--table', '--out=x'), '--config says size, which --table'),
    (('--table', '--out=x', '--jobs=0'), '--jobs is 0; allowed: 1 or more.'),
    (
      ('--table', '--out=x', '--topologies=v5e:3x3'),
      "--topologies has 'v5e:3x3'; slices of v5e",
    ),
    (('--table', '--out=x', '--sizes=9b'), "--sizes has '9b'"),
    (('--table', '--out=x', '--sizes='), '--sizes is empty'),
    (
      ('--table', '--out=README.md'),
      '--out is README.md, which cannot be used',
    ),
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
def test_bad_input_is_one_sentence(arguments, sentence):
  done = aot(*arguments)
  assert done.returncode == 2 and not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and sentence in line
  assert not (processes.ROOT / 'x').exists()


@pytest.mark.skipif(IS_HERE, reason='libtpu is installed')
def test_without_libtpu_it_says_where_to_get_it():
  done = aot(CONFIG, '--topology=v5e:2x2')
  assert done.returncode == 2 and not done.stdout
  assert 'pip install "jax[tpu]"' in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason='no .venv-tpu with libtpu is here')
def test_a_slice_that_is_not_there(tmp_path):
  file = tmp_path / 'not yet there' / 'told.json'
  done = aot(
    '--config=configs/quickstart.py',
    '--config.model.dtype=bfloat16',
    '--topology=v5e:2x2',
    '--prompt_tokens=100',
    f'--json={file}',
    python=WITH_LIBTPU,
  )
  assert done.returncode == 0, done.stderr
  told = json.loads(file.read_text())
  assert told['fits'] and told['chips'] == 4
  assert 15e9 < told['memory']['usable'] < 17.2e9
  for word in ('Fits', 'at least', 'Assumed: Episodes are', 'compact'):
    assert word in done.stdout
  assert any('splash' in name for name in told['kernels'])
