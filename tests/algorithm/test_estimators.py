"""The estimators by name: what each stands for, and what all promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import advantages, estimators, turn_advantages

K, MEMBERS = 4, 4
CRITIC = ('gae', 'turn_gae')


def inputs(batch):
  """The keyword arguments that every estimator is called with."""
  names = ('reward', 'value', 'entropy', 'sampled', 'turn', 'anchor')
  given = dict(zip([f'{n}_BT' for n in names], batch.take(*names), strict=True))
  returns = [sum(reward_K) for reward_K in batch.turn_rewards()]
  given['return_PG'] = jnp.array(returns, jnp.float32).reshape(-1, MEMBERS)
  return given


@functools.cache
def compiled(name):
  estimate = functools.partial(estimators.ESTIMATORS[name], num_turns=K)
  return jax.jit(lambda given: estimate(**given))


def white(advantage_BT, sampled_BT):
  """Whitened over the sampled tokens, float64."""
  chosen = np.asarray(advantage_BT, np.float64)[sampled_BT]
  out_BT = np.zeros(sampled_BT.shape)
  out_BT[sampled_BT] = (chosen - chosen.mean()) / chosen.std(ddof=1)
  return out_BT


def test_group_relative_is_one_number_a_row(play):
  batch = play(0)
  got = compiled('group_relative')(inputs(batch))
  returns = [sum(reward_K) for reward_K in batch.turn_rewards()]
  for row, value in enumerate(returns):
    group = returns[row // MEMBERS * MEMBERS :][:MEMBERS]
    want = (value - np.mean(group)) / np.std(group, ddof=1)
    sampled_T = batch.arrays['sampled_BT'][row]
    np.testing.assert_allclose(
      got.advantage_BT[row], np.where(sampled_T, want, 0), atol=1e-4
    )
  plain = estimators.group_relative(**inputs(batch), normalize_std=False)
  want = returns[0] - np.mean(returns[:MEMBERS])
  first = batch.spans_B[0][0][0]
  np.testing.assert_allclose(plain.advantage_BT[0, first], want, rtol=1e-5)


@pytest.mark.parametrize('placement', ['final', 'turn'])
def test_gae_pays_where_it_is_told_to(play, placement):
  batch = play(1)
  got = estimators.gae(**inputs(batch), reward_placement=placement)
  sampled_BT = batch.arrays['sampled_BT']
  target_BT = np.zeros(sampled_BT.shape)
  for row, reward_K in enumerate(batch.turn_rewards()):
    for k, span_S in enumerate(batch.spans_B[row]):
      # With lambda 1 the target is what is still to come.
      target_BT[row, span_S] = sum(
        reward_K if placement == 'final' else reward_K[k:]
      )
  np.testing.assert_allclose(got.return_BT, target_BT, atol=1e-5)
  error_BT = target_BT - batch.arrays['value_BT']
  np.testing.assert_allclose(
    got.advantage_BT, white(error_BT, sampled_BT), atol=1e-5
  )
  np.testing.assert_array_equal(got.critic_BT, sampled_BT)


def test_gae_pays_at_the_end_unless_told_and_hands_its_numbers_on(play):
  given = inputs(play(2))
  got = estimators.gae(**given, discount=0.9, lam=0.5)
  reward_BT = advantages.on_last_token(
    given['return_PG'].reshape(-1), given['sampled_BT']
  )
  advantage_BT, return_BT = advantages.gae(
    reward_BT, given['value_BT'], given['sampled_BT'], discount=0.9, lam=0.5
  )
  np.testing.assert_allclose(got.return_BT, return_BT, atol=1e-5)
  want_BT = white(advantage_BT, np.asarray(given['sampled_BT']))
  np.testing.assert_allclose(got.advantage_BT, want_BT, atol=1e-5)


def test_an_unknown_placement_is_an_error(play):
  with pytest.raises(ValueError, match="'turn'.*'token'"):
    estimators.gae(**inputs(play(0)), reward_placement='token')


def test_turn_gae_is_whitened_and_its_target_is_not(play):
  given = inputs(play(3))
  numbers = dict(num_turns=K, discount=0.8, lam=0.4)
  got = estimators.turn_gae(**given, **numbers)
  names = ('reward_BT', 'value_BT', 'sampled_BT', 'turn_BT')
  advantage_BT, return_BT, critic_BT = turn_advantages.turn_gae(
    *(given[name] for name in names), **numbers
  )
  want_BT = white(advantage_BT, np.asarray(given['sampled_BT']))
  np.testing.assert_allclose(got.advantage_BT, want_BT, atol=1e-5)
  np.testing.assert_array_equal(got.return_BT, return_BT)
  np.testing.assert_array_equal(got.critic_BT, critic_BT)


def test_gigpo_hands_its_numbers_on(play):
  given = inputs(play(0))
  numbers = dict(
    num_turns=K, normalize_std=False, step_weight=0.5, discount=0.7
  )
  got = estimators.gigpo(**given, **numbers)
  names = ('reward_BT', 'sampled_BT', 'turn_BT', 'anchor_BT')
  want_BT = turn_advantages.gigpo(
    *(given[name] for name in names), members=MEMBERS, **numbers
  )
  np.testing.assert_array_equal(got.advantage_BT, want_BT)


def test_gigpo_of_unlike_states_is_group_relative(play):
  given = inputs(play(1))
  given['anchor_BT'] = jnp.arange(given['anchor_BT'].size).reshape(
    given['anchor_BT'].shape
  )
  np.testing.assert_allclose(
    compiled('gigpo')(given).advantage_BT,
    compiled('group_relative')(given).advantage_BT,
    atol=1e-5,
  )


def test_empg_modulates_group_relative(play):
  given = inputs(play(2))
  numbers = dict(scale=2.0, clarity_scale=0.5, clarity_bonus=0.3)
  outcome = estimators.group_relative(**given, normalize_std=False)
  want_BT = turn_advantages.entropy_modulated(
    outcome.advantage_BT,
    given['entropy_BT'],
    given['sampled_BT'],
    given['turn_BT'],
    num_turns=K,
    **numbers,
  )
  got = estimators.empg(**given, num_turns=K, normalize_std=False, **numbers)
  np.testing.assert_allclose(got.advantage_BT, want_BT, atol=1e-6)


@pytest.mark.parametrize('name', estimators.ESTIMATORS)
def test_credit_is_float32_and_zero_off_sampled_tokens(play, name):
  given = inputs(play(3))
  if name not in CRITIC:
    given['value_BT'] = None
  credit = compiled(name)(given)
  off_BT = ~np.asarray(given['sampled_BT'])
  assert credit.advantage_BT.dtype == jnp.float32
  assert np.isfinite(credit.advantage_BT).all()
  assert np.abs(credit.advantage_BT).max() > 0.1
  assert not np.any(credit.advantage_BT[off_BT])
  has_critic = name in CRITIC
  assert (credit.return_BT is not None) == has_critic
  assert (credit.critic_BT is not None) == has_critic
  if has_critic:
    assert credit.return_BT.dtype == jnp.float32
    assert credit.critic_BT.dtype == bool
    assert not np.any(credit.critic_BT[off_BT])


@pytest.mark.parametrize('name', estimators.ESTIMATORS)
def test_nothing_sampled_gives_zero_and_no_nan(play, name):
  batch = play(3)
  for part in ('sampled', 'reward'):
    batch.arrays[f'{part}_BT'][:] = 0
  given = inputs(batch)
  given['return_PG'] = 0 * given['return_PG']
  credit = compiled(name)(given)
  np.testing.assert_array_equal(credit.advantage_BT, 0 * given['value_BT'])
  if name in CRITIC:
    assert not np.any(credit.return_BT)
    assert not np.any(credit.critic_BT)
