"""The comparison command: refused at once, resumed, and its table."""

import json

import pytest
from command import assert_refused, command

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
    (['--arms=uniform,best', *SMALL], ["--arms has 'best'", 'weights']),
    (['--arms=dqn:uniform,uniform', *SMALL], ['algo', 'dqn', 'grpo, ppo']),
    (['--arms=uniform:gae,uniform', *SMALL], ['estimator', 'gae', 'gigpo']),
    (['--arms=ppo:uniform:a:b,uniform', *SMALL], ['--arms', 'ppo:uniform:a:b']),
    (['--arms=uniform,uniform', *SMALL], ['--arms', 'each arm once']),
    (
      ['--arms=uniform,grpo:uniform:group_relative', *SMALL],
      ['--arms', 'grpo:uniform:group_relative', 'the same'],
    ),
    (['--arms=uniform:a:b,uniform', *SMALL], ['uniform is not an algorithm']),
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
      ['--config.critic.warmup', 'no effect on any arm'],
    ),
    (['--arms=a,b', '--seeds=0', *SMALL[:1]], ['seeds']),
  ],
)
def test_bad_arms_refused(arguments, words, tmp_path):
  done = command('compare', *arguments, f'--workdir={tmp_path / "all"}')
  assert_refused(done, *words)
  assert not (tmp_path / 'all').exists()


def test_several_tasks_refused(tmp_path):
  out = tmp_path / 'out'
  slurm = {'SLURM_STEP_NODELIST': 'n1', 'SLURM_NTASKS': '2'}
  arguments = ('--arms=uniform,actfocus', *SMALL, f'--workdir={out}')
  done = command('compare', *arguments, **slurm)
  assert_refused(done, 'one process, and Slurm has started several')
  assert not out.exists()


@pytest.mark.slow
def test_rerun_trains_nothing_and_compares(tmp_path):
  workdir = tmp_path / 'all'
  arguments = (
    *SMALL,
    '--arms=uniform:gigpo,ppo:actfocus',
    f'--workdir={workdir}',
    f'--config.warm_start.cache={tmp_path / "cache"}',
  )
  done = command('compare', *arguments)
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
  again = command('compare', *arguments)
  assert again.returncode == 0 and 'seed 0' not in again.stdout
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*.jsonl')} == before
