"""A run goes on with another batch: which boards, which samples, which step."""

import json

import jax
import numpy as np
import pytest
import small_run

from actfocus_jax import loop
from actfocus_jax.config import resume, schema
from actfocus_jax.rollout import collector
from actfocus_jax.run import checkpoint, directory, metrics

FIRST = schema.FIRST_TRAINING_SEED
# What a step is made of, and rounding may move.
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


def copied(workdir, to):
  """A copy to go on in."""
  import shutil

  return shutil.copytree(workdir, to / 'copy')


@pytest.fixture
def asked(monkeypatch):
  """The seeds of every rollout of training."""
  seen, collect = [], collector.Collector.collect

  def noting(self, policy, seeds, *arguments, **more):
    if seeds[0] >= FIRST:
      seen.append(seeds)
    return collect(self, policy, seeds, *arguments, **more)

  monkeypatch.setattr(collector.Collector, 'collect', noting)
  return seen


@pytest.mark.slow
def test_boards_neither_repeat_nor_are_left_out(
  cache, one_step, tmp_path, asked, capsys
):
  workdir = copied(one_step, tmp_path)
  for steps, prompts in ((3, 16), (4, 8)):
    size = dict(rollout__prompts=prompts, num_steps=steps)
    loop.train(config(cache, **size), workdir)
  ends = [(seeds[0] - FIRST, seeds[-1] - FIRST) for seeds in asked]
  assert ends == [(8, 23), (24, 39), (40, 47)]
  told = capsys.readouterr().out
  assert 'Going on from step 1: rollout.prompts was 8 and is now 16.' in told
  assert 'Going on from step 3: rollout.prompts was 16 and is now 8.' in told
  rows = metrics.read(workdir / 'config_changes.jsonl')
  assert [row['step'] for row in rows] == [1, 3]
  assert rows[0]['changed']['rollout.prompts'] == [8, 16]
  noted = json.loads((workdir / 'config.json').read_text())
  assert noted['rollout.prompts'] == 8 and noted['num_steps'] == 4


@pytest.mark.slow
def test_a_killed_change_goes_on_from_the_same_board(
  cache, one_step, tmp_path, asked, monkeypatch
):
  workdir = copied(one_step, tmp_path)
  bigger = config(cache, rollout__prompts=16, num_steps=2)

  def die(*arguments, **more):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(loop, 'run_step', die)
    loop.train(bigger, workdir)
  loop.train(bigger, workdir)
  assert [seeds[0] - FIRST for seeds in asked] == [8, 8]
  assert len(asked[1]) == 16


class Nothing:
  """A state of nothing but its step."""

  def __init__(self, workdir, prompts, writes=True):
    c = schema.defaults()
    c.rollout.prompts = prompts
    self.run = directory.RunDirectory(workdir, c, {'sha256': ''}, writes=writes)

  def next_seed(self):
    with self.run as run:
      return run.restore({'step': 0})[1]


def test_a_checkpoint_without_a_seed_is_counted(tmp_path):
  assert Nothing(tmp_path, 8).next_seed() == FIRST
  old = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  old.save(5, {'step': 5}, {'step': 5})  # As earlier versions did.
  old.close()
  assert Nothing(tmp_path, 8).next_seed() == FIRST + 40
  # Killed before its first own checkpoint, twice, with other prompts.
  assert Nothing(tmp_path, 16).next_seed() == FIRST + 40
  assert Nothing(tmp_path, 4).next_seed() == FIRST + 40
  with Nothing(tmp_path, 4).run as run:
    run.save(6, {'step': 6}, None, FIRST + 44)
  assert Nothing(tmp_path, 32).next_seed() == FIRST + 44


def test_a_process_that_does_not_write_leaves_all_as_it_is(tmp_path):
  with Nothing(tmp_path, 8).run as run:
    run.metrics.append({'step': 1})
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with Nothing(tmp_path, 16, writes=False).run as other:
      assert other.restore({'step': 0}) == (None, FIRST)
      other.metrics.append({'step': 2})
      other.evaluations.append({'step': 2})
      other.write('baselines.json', {})
      other.write_episodes(2, [{}])
    after = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
  assert after == before and len(before) == 4


def second_step(cache, one_step, tmp_path, **changes):
  workdir = copied(one_step, tmp_path)
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
def test_the_split_of_the_work_changes_rounding_alone(
  cache, one_step, usual, tmp_path, changes
):
  row = second_step(cache, one_step, tmp_path, **changes)
  assert row['train/tokens'] == usual['train/tokens']
  assert row['train/return'] == usual['train/return']
  for name in CLOSE:
    print(name, abs(row[name] - usual[name]))
    np.testing.assert_allclose(row[name], usual[name], rtol=1e-4, atol=1e-6)


def test_batches_may_change_but_not_where_runs_are_compared():
  c = schema.defaults()
  old = schema.to_json(c)
  c.rollout.update(prompts=16, members=8)
  c.learner.minibatch = 64
  assert resume.difference(old, c) is None
  told = resume.difference(old, c, same_batch=True)
  assert told == 'learner.minibatch was 32 and is now 64'
  c.rollout.temperature = 0.5
  assert 'rollout.temperature' in resume.difference(old, c)
