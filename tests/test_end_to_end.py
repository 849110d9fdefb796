"""The whole run at its smallest, on eight devices: train, stop, go on."""

import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy
import small_run

from actfocus_jax import errors, loop
from actfocus_jax.config import schema
from actfocus_jax.run import checkpoint, directory, metrics, progress


def config(cache: pathlib.Path, **changes):
  """Four steps with an evaluation and a checkpoint at every other one."""
  every = dict(
    eval__every=2, checkpoint__every=2, checkpoint__keep=4, num_steps=4
  )
  every |= dict(eval__save=2, learner__self_check=True)
  return small_run.config(cache, **every | changes)


@pytest.fixture(scope='module', autouse=True)
def ordinary_promotion():
  """Adam of optax raises a float to an int32; our own stages are strict."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture(scope='module')
def whole(cache, tmp_path_factory):
  """A run of four steps that nothing interrupted."""
  workdir = tmp_path_factory.mktemp('whole')
  summary = loop.train(config(cache), workdir)
  return workdir, summary


def rows(workdir: pathlib.Path, name: str) -> list[dict]:
  """The rows without what a clock or the process decides."""
  timed = (
    *('time/', 'compiles', 'seconds'),
    *('rollout/tokens_per_second', 'rollout/environment_share'),
  )
  return [
    {k: v for k, v in row.items() if not k.startswith(timed)}
    for row in metrics.read(workdir / name)
  ]


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint, by the name of its leaf."""
  store = checkpoint.Checkpoints(workdir / 'checkpoints', read_only=True)
  state = store._open().restore(step)['state']
  store.close()
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def assert_same_run(one: pathlib.Path, other: pathlib.Path):
  assert rows(one, 'metrics.jsonl') == rows(other, 'metrics.jsonl')
  assert rows(one, 'eval.jsonl') == rows(other, 'eval.jsonl')
  left, right = arrays(one, 4), arrays(other, 4)
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_run_directory_holds_what_the_contract_promises(whole):
  workdir, summary = whole
  assert [row['step'] for row in rows(workdir, 'metrics.jsonl')] == [1, 2, 3, 4]
  assert [row['step'] for row in rows(workdir, 'eval.jsonl')] == [0, 2, 4]
  report = workdir / 'report'
  assert summary == report / 'summary.md'
  for name in ('curve.png', 'trajectories.html', 'summary.md'):
    assert (report / name).stat().st_size > 0
  chance = json.loads((workdir / 'baselines.json').read_text())
  assert 0 < chance['random_success'] < 1
  assert sorted(p.name for p in (workdir / 'rollouts').iterdir()) == [
    'step_000000.jsonl',
    'step_000002.jsonl',
    'step_000004.jsonl',
  ]


def test_metrics_show_the_method_at_work(whole):
  workdir, _ = whole
  for row in metrics.read(workdir / 'metrics.jsonl'):
    share, mass = row['weights/action_share'], row['weights/action_mass']
    assert 0 < share < mass < 1  # alpha 0.1 moves weight to the actions
    assert row['signal/std'] > 0
    assert row['selection/kept'] == 8
    assert row['selection/kept_with_spread'] > 0
    assert row['train/valid_turns'] > 0
    assert row['rollout/sampler_gap_max'] < 1e-3
    assert 0 <= row['train/success'] <= 1


def test_parameters_change_with_training(whole):
  workdir, _ = whole
  before, after = arrays(workdir, 2), arrays(workdir, 4)
  moved = [
    n for n in before if 'actor.params' in n and (before[n] != after[n]).any()
  ]
  assert moved


def test_continued_run_equals_the_whole_one(cache, whole, tmp_path):
  loop.train(config(cache, num_steps=2), tmp_path)
  assert len(rows(tmp_path, 'metrics.jsonl')) == 2
  # Rows of steps that were not saved: they must go, and be done again.
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 3, "actor/loss": 7.0}\n{"step": 4, "ac')
  loop.train(config(cache), tmp_path)
  assert_same_run(whole[0], tmp_path)


def test_sigterm_saves_and_the_same_command_goes_on(
  cache, whole, tmp_path, monkeypatch, capsys
):
  update = progress.Progress.update

  def signalling_update(self, step, **values):
    update(self, step, **values)
    if 'success' in values and step == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(progress.Progress, 'update', signalling_update)
    loop.train(config(cache), tmp_path)
  assert 'Stopped by SIGTERM after step 3 of 4' in capsys.readouterr().out
  assert len(rows(tmp_path, 'metrics.jsonl')) == 3
  loop.train(config(cache), tmp_path)
  assert_same_run(whole[0], tmp_path)


def test_checkpoint_is_evaluated_as_the_run_did(cache, whole):
  workdir, _ = whole
  step, row = loop.evaluate(config(cache), workdir, 2)
  logged = rows(workdir, 'eval.jsonl')[1]
  assert step == logged['step'] == 2
  assert row['success'] == logged['success']
  assert row['tokens'] == logged['tokens']


def test_evaluation_reads_a_checkpoint_and_disturbs_nothing(cache, whole):
  workdir, _ = whole
  half_written = workdir / 'checkpoints' / '9.orbax-checkpoint-tmp'
  half_written.mkdir()
  before = sorted(p.name for p in workdir.rglob('*'))
  loop.evaluate(config(cache), workdir, 4)
  assert sorted(p.name for p in workdir.rglob('*')) == before
  half_written.rmdir()
  with pytest.raises(errors.UsageError, match='--step is 3.*2, 4'):
    loop.evaluate(config(cache), workdir, 3)


def test_one_process_at_a_time(cache, tmp_path):
  run = directory.RunDirectory(
    tmp_path, schema.to_json(config(cache)), {'sha256': ''}
  )
  with run, pytest.raises(errors.UsageError, match='another process'):
    loop.train(config(cache), tmp_path)


def test_another_reference_is_refused(cache, whole, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(whole[0], workdir)
  note = json.loads((workdir / 'model.json').read_text())
  note['sha256'] = '0' * 64
  (workdir / 'model.json').write_text(json.dumps(note))
  before = {p.name: p.read_bytes() for p in workdir.iterdir() if p.is_file()}
  with pytest.raises(errors.UsageError, match='frozen reference'):
    loop.train(config(cache, num_steps=5), workdir)
  # And nothing of the refused command stays in the run.
  after = {p.name: p.read_bytes() for p in workdir.iterdir() if p.is_file()}
  assert after == before


def test_a_model_that_does_not_fit_is_refused(cache, whole, tmp_path):
  base = pathlib.Path(json.loads((whole[0] / 'model.json').read_text())['path'])
  model = tmp_path / 'model'
  shutil.copytree(base, model)
  c = config(cache, model__path=str(model))
  raw = json.loads((model / 'config.json').read_text())
  for changed, message in (
    ({'vocab_size': 300}, 'vocab_size in config.json is 300'),
    ({'max_position_embeddings': 100}, 'limits.context is 224; .* up to 100'),
  ):
    (model / 'config.json').write_text(json.dumps(raw | changed))
    with pytest.raises(errors.UsageError, match=message):
      loop.train(c, tmp_path / 'run')
  (model / 'config.json').write_text(json.dumps(raw))
  (model / 'generation_config.json').write_text('{"eos_token_id": 99999}')
  with pytest.raises(errors.UsageError, match='up to id 99999'):
    loop.train(c, tmp_path / 'run')
  (model / 'generation_config.json').unlink()
  tensors = safetensors.numpy.load_file(model / 'model.safetensors')
  tensors['model.layers.1.mlp.up_proj.weight'][3, 4] = np.nan
  safetensors.numpy.save_file(tensors, model / 'model.safetensors')
  with pytest.raises(errors.UsageError, match='layers.1.mlp.up_proj.* finite'):
    loop.train(c, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_another_seed_is_another_run(cache, whole, tmp_path):
  loop.train(config(cache, seed=1, num_steps=1), tmp_path)
  first = rows(whole[0], 'metrics.jsonl')[0]
  other = rows(tmp_path, 'metrics.jsonl')[0]
  assert first['train/tokens'] != other['train/tokens']
