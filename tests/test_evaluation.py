"""Evaluation: the printed line, the mesh of a run, refusals."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import small_run

from actfocus_jax import errors, evaluation, loop
from actfocus_jax.config import schema
from actfocus_jax.parallel import processes

ROW = {
  'success': 0.25,
  'success_low': 0.125,
  'success_high': 0.5,
  'pass_at_g': 0.75,
  'episodes': 64,
  'failed': 0.0,
}
PLAIN = (
  'step 7: held-out success 25.0% (95 % interval 12.5% to 50.0%), '
  'pass@G 75.0%, 64 episodes'
)


def test_line_of_one_environment():
  assert evaluation.line(7, ROW) == PLAIN


def test_line_of_shop_has_purchase_rate():
  row = ROW | {'info/bought': 0.0, 'info/reward': 0.1}
  assert evaluation.line(7, row) == f'{PLAIN}, purchase rate 0.0%'


def test_line_of_mixture_has_failures_and_parts():
  row = ROW | {'failed': 0.5, 'a/success': 0.5, 'a/failed': 0, 'b/success': 0.0}
  assert evaluation.line(7, row) == (
    f'{PLAIN}; the environment failed in 50.0% of them; a 50.0%, b 0.0%'
  )


@pytest.mark.parametrize(
  ('workdir', 'step', 'told'),
  [
    ('runs/other', 2, "--workdir is 'runs/one' in process 0 and 'runs/other'"),
    ('runs/one', 3, '--step is 2 in process 0 and 3 in process 1; allowed: '),
  ],
)
def test_processes_with_other_checkpoints_refused(
  monkeypatch, workdir, step, told
):
  theirs = iter([workdir, step])

  def exchange(value):
    return [value, next(theirs)]

  monkeypatch.setattr(processes, 'allgather', exchange)
  with pytest.raises(errors.UsageError, match=told):
    loop.evaluate(None, pathlib.Path('runs/one'), 2)


# --- The mesh of a run on another machine ------------------------------------

ROOT = pathlib.Path(__file__).resolve().parent.parent
OWN = dict(data=1, fsdp=4, tensor=2, dcn_data=-1, dcn_fsdp=1)
# In a process of its own, for other commands have flags of the same names:
# CASES are lists of a number of devices and what is told beside --workdir.
EVALUATE = """
import functools, json, sys
import jax
from absl import flags
from actfocus_jax import build, errors, evaluate, evaluation, loop
from actfocus_jax.cli import flags as flags_lib
from actfocus_jax.parallel import mesh as mesh_lib

make, meshes = mesh_lib.make_mesh, []

def play(c, workdir, step):
  with build.refusing_misfits():
    build.mesh(c)
  meshes.append(dict(c.mesh))
  return 0, {}

def outcome(workdir, devices, *told):
  part = jax.devices()[:devices]
  mesh_lib.make_mesh = functools.partial(make, devices=part)
  sys.argv = ['evaluate', f'--workdir={workdir}', *told]
  flags.FLAGS.unparse_flags()
  try:
    evaluate.main(flags_lib._parse(sys.argv, 'workdir'))
  except errors.UsageError as refused:
    return str(refused)
  return meshes.pop()

loop.evaluate = play
evaluation.line = lambda step, row: ''
workdir, cases = sys.argv[1:]
told = [outcome(workdir, *case) for case in json.loads(cases)]
print(json.dumps(told))
"""


@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
  """(devices, *told) -> the mesh of the evaluation, or the refusal.

  The run was one on eight devices; nothing but its config is read.
  """
  workdir = tmp_path_factory.mktemp('run')
  changes = {f'mesh__{name}': size for name, size in OWN.items()}
  c = small_run.config(workdir, **changes)
  (workdir / 'config.json').write_text(json.dumps(schema.to_json(c)))
  done = subprocess.run(
    [sys.executable, '-c', EVALUATE, str(workdir), json.dumps(CASES)],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  outcomes = json.loads(done.stdout.splitlines()[-1])
  return lambda *case: outcomes[CASES.index(list(case))]


FSDP = '--config.mesh.fsdp=2'
REFUSED = {
  '--config.seed=1': '--config.seed=1 would change the run of --workdir; ',
  '--config.mesh.fdsp=2': 'mesh.fdsp is not a field of the config; did',
  '--config.mesh.fsdp=0': 'mesh.fsdp is 0; allowed: -1',
  '--config.mesh.fsdp=x': "mesh.fsdp is 'x'; allowed: a whole number",
}
CASES = [[8], [4], [1], [4, FSDP], [8, FSDP], *([8, told] for told in REFUSED)]


def test_run_keeps_its_mesh_if_it_fits(outcome):
  assert outcome(8) == OWN
  assert outcome(4) == outcome(1) == schema.MESH


def test_mesh_flag_overrides_mesh_of_run(outcome):
  assert outcome(4, FSDP) == OWN | {'fsdp': 2}
  # What was told does not silently become another one.
  assert 'fsdp=2, tensor=2 does not fit 8 devices' in outcome(8, FSDP)


@pytest.mark.parametrize('told', REFUSED)
def test_bad_mesh_flag_refused(outcome, told):
  assert outcome(8, told).startswith(REFUSED[told])
