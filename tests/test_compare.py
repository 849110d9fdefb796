"""The comparison command: refused at once, resumed, and its table."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def compare(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', 'actfocus_jax.compare', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=400,
    check=False,
  )


SMALL = (
  *('--config=configs/quickstart.py', '--seeds=1'),
  *('--config.num_steps=1', '--config.eval.every=0', '--config.eval.save=0'),
  *('--config.eval.prompts=8', '--config.eval.members=1'),
  *('--config.rollout.prompts=8', '--config.rollout.members=2'),
  *('--config.learner.minibatch=8', '--config.learner.microbatch=8'),
  *('--config.limits.turns=1', '--config.limits.context=160'),
  *('--config.rollout.lengths=(160,)', '--config.rollout.cache_block=160'),
  *('--config.warm_start.episodes=32', '--config.warm_start.steps=20'),
  *('--config.warm_start.batch=8', '--config.warm_start.hidden_size=32'),
)


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['--arms=uniform,actfocus'], ['--config is missing']),
    (['--arms=uniform', *SMALL], ['--arms', 'uniform', 'two or more']),
    (['--arms=uniform,best', *SMALL], ['weights', 'best', 'actfocus']),
    (['--arms=dqn:uniform,uniform', *SMALL], ['algo', 'dqn', 'grpo, ppo']),
    (['--arms=uniform:gae,uniform', *SMALL], ['estimator', 'gae', 'gigpo']),
    (['--arms=ppo:uniform:a:b,uniform', *SMALL], ['--arms', 'ppo:uniform:a:b']),
    (['--arms=uniform,uniform', *SMALL], ['--arms', 'each arm once']),
    (
      ['--arms=uniform,grpo:uniform:group_relative', *SMALL],
      ['--arms', 'grpo:uniform:group_relative', 'the same'],
    ),
    (['--arms=uniform:a:b,uniform', *SMALL], ['uniform is no algorithm']),
    (
      ['--arms=uniform,actfocus', *SMALL, '--config.weights.beta=1.0'],
      ['--config.weights.beta', 'every arm'],
    ),
    (
      ['--arms=uniform,actfocus', *SMALL, '--config.seed=3'],
      ['--config.seed', 'every arm', '--seeds'],
    ),
    (
      ['--arms=uniform,actfocus', *SMALL, '--config.critic.warmup=3'],
      ['--config.critic.warmup', 'no arm'],
    ),
    (['--arms=a,b', '--seeds=0', *SMALL[:1]], ['seeds']),
  ],
)
def test_refused(arguments, words, tmp_path):
  done = compare(*arguments, f'--workdir={tmp_path / "all"}')
  assert done.returncode == 2, done.stderr
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith('error: ')
  for word in words:
    assert word in line
  assert not (tmp_path / 'all').exists()


def test_several_tasks_do_not_compare(tmp_path, monkeypatch):
  monkeypatch.setenv('SLURM_STEP_NODELIST', 'n1')
  monkeypatch.setenv('SLURM_NTASKS', '2')
  out = tmp_path / 'out'
  done = compare('--arms=uniform,actfocus', *SMALL, f'--workdir={out}')
  assert done.returncode == 2
  assert 'one process, and Slurm has started several' in done.stderr
  assert not out.exists()


@pytest.mark.slow
def test_it_trains_what_is_missing_and_compares(tmp_path):
  workdir = tmp_path / 'all'
  arguments = (
    *SMALL,
    '--arms=uniform:gigpo,ppo:actfocus',
    f'--workdir={workdir}',
    f'--config.warm_start.cache={tmp_path / "cache"}',
  )
  done = compare(*arguments)
  assert done.returncode == 0, done.stderr
  table = (workdir / 'comparison.md').read_text()
  assert table.strip() in done.stdout
  arms = (
    *(('uniform-gigpo', 'grpo', 0.0, 'gigpo'),),
    *(('ppo-actfocus', 'ppo', 0.5, 'auto'),),
  )
  for arm, algo, beta, estimator in arms:
    run = workdir / arm / 'seed0'
    snapshot = json.loads((run / 'config.json').read_text())
    assert (snapshot['algo'], snapshot['num_steps']) == (algo, 1)
    assert snapshot['weights.beta'] == beta
    assert snapshot['advantage.estimator'] == estimator
    rows = (run / 'eval.jsonl').read_text().splitlines()
    assert [json.loads(row)['step'] for row in rows] == [0, 1]
  assert (workdir / 'comparison.png').exists()
  assert '| uniform:gigpo |' in table and '| ppo:actfocus |' in table
  # Again: nothing is trained, nothing changes.
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*.jsonl')}
  again = compare(*arguments)
  assert again.returncode == 0 and 'seed 0' not in again.stdout
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*.jsonl')} == before
