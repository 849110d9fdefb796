"""A run resumes with another batch or split: boards, samples, step."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import small_run

from actfocus_jax import loop
from actfocus_jax.config import resume, schema
from actfocus_jax.rollout import collector
from actfocus_jax.run import metrics

FIRST = schema.FIRST_TRAINING_SEED
# Metrics of a step that may differ by rounding.
CLOSE = ('actor/loss', 'actor/grad_norm', 'actor/entropy', 'signal/mean')


@pytest.fixture(scope='module', autouse=True)
def ordinary_promotion():
  with jax.numpy_dtype_promotion('standard'):
    yield


def config(cache, **changes):
  every = dict(checkpoint__every=1, checkpoint__keep=9, num_steps=1)
  return small_run.config(cache, **every | changes)


@pytest.fixture(scope='module')
def one_step(cache, tmp_path_factory):
  """A run that has made one step of 8 prompts."""
  workdir = tmp_path_factory.mktemp('one')
  loop.train(config(cache), workdir)
  return workdir


@pytest.mark.slow
def test_every_metric_of_a_run_is_in_the_table(one_step):
  room = pathlib.Path(loop.__file__).parent / 'run'
  page = (room / 'README.md').read_text()
  (row,) = metrics.read(one_step / 'metrics.jsonl')
  assert [key for key in row if f'`{key}`' not in page] == []
  for row in metrics.read(one_step / 'eval.jsonl'):
    missing = [key for key in row if f'`{key}`' not in page]
    assert [key for key in missing if f'`train/{key}`' not in page] == []


@pytest.fixture
def played(monkeypatch):
  """Seeds of every rollout of training."""
  seen, collect = [], collector.Collector.collect

  def collecting(self, policy, seeds, *arguments, **more):
    if seeds[0] >= FIRST:
      seen.append(seeds)
    return collect(self, policy, seeds, *arguments, **more)

  monkeypatch.setattr(collector.Collector, 'collect', collecting)
  return seen


@pytest.mark.slow
def test_prompts_change_boards_neither_repeat_nor_are_left_out(
  cache, one_step, tmp_path, played, capsys
):
  workdir = shutil.copytree(one_step, tmp_path / 'copy')
  for steps, prompts in ((3, 16), (4, 8)):
    size = dict(rollout__prompts=prompts, num_steps=steps)
    loop.train(config(cache, **size), workdir)
  ends = [(seeds[0] - FIRST, seeds[-1] - FIRST) for seeds in played]
  assert ends == [(8, 23), (24, 39), (40, 47)]
  printed = capsys.readouterr().out
  assert 'Going on from step 1: rollout.prompts was 8 and is now 16.' in printed
  assert 'Going on from step 3: rollout.prompts was 16 and is now 8.' in printed
  rows = metrics.read(workdir / 'config_changes.jsonl')
  assert [row['step'] for row in rows] == [1, 3]
  assert rows[0]['changed']['rollout.prompts'] == [8, 16]
  newest = json.loads((workdir / 'config.json').read_text())
  assert newest['rollout.prompts'] == 8 and newest['num_steps'] == 4


@pytest.mark.slow
def test_prompts_change_killed_resumes_from_the_same_board(
  cache, one_step, tmp_path, played, monkeypatch
):
  workdir = shutil.copytree(one_step, tmp_path / 'copy')
  bigger = config(cache, rollout__prompts=16, num_steps=2)

  def die(*arguments):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(metrics.MetricsFile, 'append', die)
    loop.train(bigger, workdir)
  loop.train(bigger, workdir)
  assert [seeds[0] - FIRST for seeds in played] == [8, 8]
  assert len(played[1]) == 16


def second_step(cache, one_step, tmp_path, **changes):
  workdir = shutil.copytree(one_step, tmp_path / 'copy')
  loop.train(config(cache, num_steps=2, **changes), workdir)
  return metrics.read(workdir / 'metrics.jsonl')[1]


@pytest.fixture(scope='module')
def usual(cache, one_step, tmp_path_factory):
  return second_step(cache, one_step, tmp_path_factory.mktemp('usual'))


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    dict(rollout__slots=8),
    dict(rollout__decode_steps=3, rollout__lengths=(200, 224)),
    dict(rollout__cache_block=32, rollout__observation_block=8),
    dict(learner__microbatch=16, learner__score_chunk=64),
    dict(learner__fused=False, model__remat=True),
  ],
  ids=lambda changes: ','.join(changes),
)
def test_split_of_the_work_changes_only_rounding(
  cache, one_step, usual, tmp_path, changes
):
  row = second_step(cache, one_step, tmp_path, **changes)
  assert row['train/tokens'] == usual['train/tokens']
  assert row['train/return'] == usual['train/return']
  for name in CLOSE:
    print(name, abs(row[name] - usual[name]))
    np.testing.assert_allclose(row[name], usual[name], rtol=1e-4, atol=1e-6)


def test_difference_allows_another_batch_unless_runs_are_compared():
  c = schema.defaults()
  old = schema.to_json(c)
  c.rollout.update(prompts=16, members=8)
  c.learner.minibatch = 64
  assert resume.difference(old, schema.to_json(c)) is None
  difference = resume.difference(old, schema.to_json(c), same_batch=True)
  assert difference == 'learner.minibatch was 32 and is now 64'
  c.rollout.temperature = 0.5
  assert 'rollout.temperature' in resume.difference(old, schema.to_json(c))
