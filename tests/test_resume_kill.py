"""SIGKILL inside a save, and SIGTERM: the same command resumes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import processes
import pytest
import small_run
import test_end_to_end as whole_run

from actfocus_jax.run import checkpoint, metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
SECONDS = 240  # for what takes 20

# A run whose save of step 4 never ends; only the last file is missing.
_ENDLESS = """
import pathlib, sys, time
from orbax import checkpoint as ocp

whole = ocp.JsonCheckpointHandler.async_save

async def endless(self, directory, args):
  written = await whole(self, directory, args=args)
  return [*written, Never()] if args.item.get('step') == 4 else written

class Never(ocp.future.Future):
  def result(self, timeout=None):
    pathlib.Path(sys.argv[2], 'inside').touch()
    time.sleep(1000)

ocp.JsonCheckpointHandler.async_save = endless
"""
# In processes of their own: programs that this one compiled before may round
# differently.
_TRAIN = """
import pathlib, sys
import conftest
import jax
import test_end_to_end as whole_run
from actfocus_jax import loop

jax.config.update('jax_numpy_dtype_promotion', 'standard')
cache, folder = map(pathlib.Path, sys.argv[1:3])
few = dict(eval__save=0, learner__self_check=False)
loop.train(whole_run.config(cache, **few), folder / sys.argv[3])
"""


@pytest.fixture(scope='module', autouse=True)
def ordinary_promotion():
  with jax.numpy_dtype_promotion('standard'):
    yield


def training(code, cache, folder, name):
  return subprocess.Popen(
    [sys.executable, '-c', code, str(cache), str(folder), name],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': f'{ROOT}:{ROOT}/tests'},
  )


def kill_inside_the_save(cache, folder):
  """Start a run and kill it inside its last save."""
  process = training(_ENDLESS + _TRAIN, cache, folder, 'run')
  try:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
      if (folder / 'inside').exists():
        break
      time.sleep(0.1)
  finally:
    process.kill()
  assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_run_killed_inside_a_save_equals_the_undisturbed_one(cache, tmp_path):
  assert training(_TRAIN, cache, tmp_path, 'whole').wait(SECONDS) == 0
  kill_inside_the_save(cache, tmp_path)
  run = tmp_path / 'run'
  assert (tmp_path / 'inside').exists()
  # All four steps have rows, but the fourth has half a checkpoint.
  assert len(metrics.read(run / 'metrics.jsonl')) == 4
  names = sorted(path.name for path in (run / 'checkpoints').iterdir())
  assert names[0] == '2' and 'tmp' in names[1] and len(names) == 2
  read = checkpoint.Checkpoints(run / 'checkpoints', read_only=True)
  assert read.latest_step() == 2
  read.close()

  assert training(_TRAIN, cache, tmp_path, 'run').wait(SECONDS) == 0
  whole_run.assert_same_run(tmp_path / 'whole', run)
  names = sorted(path.name for path in (run / 'checkpoints').iterdir())
  assert names == ['2', '4']


def start(workdir, cache):
  """Start the training command at its smallest."""
  small = small_run.INSTANT | {
    'num_steps': 1000,
    'checkpoint.every': 1000,
    'warm_start.cache': cache,
    'warm_start.episodes': 32,
    'warm_start.steps': 10,
  }
  return subprocess.Popen(
    [
      sys.executable,
      *('-m', 'actfocus_jax.train', '--config=configs/quickstart.py'),
      f'--workdir={workdir}',
      *(f'--config.{field}={value}' for field, value in small.items()),
    ],
    cwd=ROOT,
    env={**os.environ, **processes.environment()},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_signal_saves_and_exits_with_its_code(cache, tmp_path, number, code):
  process = start(tmp_path / 'run', cache)
  for line in process.stdout:
    if line.startswith('train '):
      process.send_signal(number)
      break
  out, err = process.communicate(timeout=SECONDS)
  assert process.returncode == code, err
  assert f'Stopped by {signal.Signals(number).name} after step' in out
  assert 'Traceback' not in err
  done = len((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines())
  extra = tmp_path / 'run' / 'checkpoints' / str(done) / 'extra' / 'metadata'
  seed = json.loads(extra.read_text())['next_seed']
  assert seed == 10_000 + 2 * done
