"""Every algorithm, estimator and control through the whole loop, briefly."""

import jax
import numpy as np
import pytest
import small_run

from actfocus_jax import build, errors, loop
from actfocus_jax.config import schema, validate
from actfocus_jax.run import checkpoint, metrics


@pytest.fixture(scope='module', autouse=True)
def ordinary_promotion():
  with jax.numpy_dtype_promotion('standard'):
    yield


ARMS = {
  'ppo': dict(algo='ppo', critic__warmup=1, learner__self_check=True),
  'ppo by turns': dict(algo='ppo', advantage__estimator='turn_gae'),
  'gigpo': dict(advantage__estimator='gigpo'),
  'empg': dict(advantage__estimator='empg', weights='uniform'),
  'top_entropy': dict(weights='top_entropy', kl__coefficient=0.01),
  'the rest': dict(
    weights='centered_energy',
    selection__rule='top_p',
    selection__ratio=0.9,
    loss__reduction='sequence_mean_token_mean',
    learner__ratio='turn',
    learner__importance_cap=2.0,
    learner__epochs=2,
    learner__minibatch=8,
    weights__alpha_end=0.5,
    weights__schedule_steps=2,
  ),
}


def read(workdir):
  return metrics.read(workdir / 'metrics.jsonl')


def arrays(workdir, step):
  manager = checkpoint.Checkpoints(workdir / 'checkpoints', read_only=True)
  state = manager._open().restore(step)['state']
  manager.close()
  return {name: np.asarray(x) for name, x in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize('arm', ARMS)
def test_it_runs_and_learns_something(arm, cache, tmp_path):
  arguments = dict(ARMS[arm])
  weights = arguments.pop('weights', 'actfocus')
  c = small_run.config(cache, weights=weights, **arguments)
  loop.train(c, tmp_path)
  rows = read(tmp_path)
  assert [row['step'] for row in rows] == [1, 2]
  for row in rows:
    assert row['actor/grad_norm'] > 0
    assert row['rollout/sampler_gap_max'] < 1e-3
    assert row['rollout/effective_sample_size'] == pytest.approx(1, abs=1e-3)
  assert rows[-1]['actor/update_norm'] > 0
  has_critic = c.algo == 'ppo'
  assert has_critic == ('critic/loss' in rows[0])
  if has_critic:
    assert rows[0]['critic/update_norm'] > 0
    assert (rows[0]['actor/update_norm'] == 0) == (c.critic.warmup > 0)
  assert schema.has_signal(c) == ('signal/mean' in rows[0])
  assert bool(c.kl.coefficient) == ('actor/kl' in rows[0])


@pytest.mark.slow
def test_ppo_that_goes_on_equals_ppo_that_was_never_stopped(cache, tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  loop.train(small_run.config(cache, algo='ppo', checkpoint__every=1), whole)
  loop.train(
    small_run.config(cache, algo='ppo', checkpoint__every=1, num_steps=1), parts
  )
  loop.train(small_run.config(cache, algo='ppo', checkpoint__every=1), parts)
  left, right = arrays(whole, 2), arrays(parts, 2)
  assert left.keys() == right.keys()
  assert any(name.startswith('critic.params') for name in left)
  for name in left:
    np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.slow
def test_a_run_that_goes_nowhere_stops_and_says_why(cache, tmp_path):
  """Groups of two that never differ: nobody reaches the goal in one action."""
  c = small_run.config(
    cache,
    num_steps=9,
    selection__patience=2,
    selection__rule='top_p',
    limits__turns=1,
    limits__action_budget=1,
    limits__max_actions=1,
    limits__format_penalty=0.0,
  )
  small_run.make_warm_start(c)
  with pytest.raises(
    errors.NoLearningSignal, match='after step 2, saved.*Remedies'
  ):
    loop.train(c, tmp_path)
  assert (tmp_path / 'report' / 'summary.md').exists()
  steps = [row['step'] for row in metrics.read(tmp_path / 'eval.jsonl')]
  assert steps == [0, 2]
  rows = read(tmp_path)
  assert [row['selection/skipped_in_a_row'] for row in rows] == [1, 2]
  assert arrays(tmp_path, 2)['step'] == 2


def test_a_failed_self_check_stops_before_the_first_update(
  cache, tmp_path, monkeypatch
):
  from actfocus_jax.learner import self_check

  strict = self_check.Limits(ratio=-1.0, sampler=1, reference=1, padding=1)
  monkeypatch.setattr(self_check, 'EXACT', strict)
  with pytest.raises(errors.RunError, match='Self-check .* ratios are not 1'):
    loop.train(small_run.config(cache, learner__self_check=True), tmp_path)
  assert read(tmp_path) == []


def test_a_dual_clip_of_0_is_none():
  c = schema.defaults()
  assert build.train_step_config(c).loss['dual_clip'] == 3.0
  c.loss.dual_clip = 0.0
  validate.check(c)
  assert build.train_step_config(c).loss['dual_clip'] is None
