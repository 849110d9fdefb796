"""Estimators by name: goldens, loops in float64, known cases, what all promise.

GiGPO has a file of its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import advantages, estimators

K, MEMBERS = 4, 4
ESTIMATORS = estimators.ESTIMATORS
CRITIC = ('gae', 'turn_gae')


@functools.cache
def compiled(name):
  compute = ESTIMATORS[name].compute
  static = ('normalize_std', 'reward_placement')
  names = [x for x in static if x in compute.__kwdefaults__]
  return jax.jit(compute, static_argnames=names)


def white(advantage_BT, sampled_BT):
  """Whitened over the sampled tokens, float64."""
  sampled_BT = np.asarray(sampled_BT)
  chosen = np.asarray(advantage_BT, np.float64)[sampled_BT]
  out_BT = np.zeros(sampled_BT.shape)
  out_BT[sampled_BT] = (chosen - chosen.mean()) / chosen.std(ddof=1)
  return out_BT


def group_relative_loop(batch, *, normalize_std=True):
  """A number for each row, float64."""
  returns, out = batch.returns(), []
  for row, value in enumerate(returns):
    group = returns[row // MEMBERS * MEMBERS :][:MEMBERS]
    scale = np.std(group, ddof=1) + 1e-6 if normalize_std else 1.0
    out.append((value - np.mean(group)) / scale)
  return out


# GRPO and PPO.


@pytest.mark.parametrize('normalize_std', [True, False])
def test_group_relative_is_one_number_a_row(play, normalize_std):
  batch = play(0)
  numbers = dict(normalize_std=normalize_std)
  got = compiled('group_relative')(batch.inputs(), **numbers)
  want_B = group_relative_loop(batch, **numbers)
  for row, want in enumerate(want_B):
    sampled_T = batch.arrays['sampled_BT'][row]
    np.testing.assert_allclose(
      got.advantage_BT[row], np.where(sampled_T, want, 0), atol=1e-4
    )


@pytest.mark.parametrize('placement', ['final', 'turn'])
def test_gae_pays_where_the_placement_says(play, placement):
  batch = play(1)
  got = estimators.gae(batch.inputs(), reward_placement=placement)
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


def test_gae_pays_at_the_end_by_default_and_uses_its_numbers(play):
  inputs = play(2).inputs()
  got = estimators.gae(inputs, discount=0.9, lam=0.5)
  reward_BT = advantages.on_last_token(
    inputs.return_PG.reshape(-1), inputs.sampled_BT
  )
  advantage_BT, return_BT = advantages.gae(
    reward_BT, inputs.value_BT, inputs.sampled_BT, discount=0.9, lam=0.5
  )
  np.testing.assert_allclose(got.return_BT, return_BT, atol=1e-5)
  np.testing.assert_allclose(
    got.advantage_BT, white(advantage_BT, inputs.sampled_BT), atol=1e-5
  )


def test_gae_of_an_unknown_placement_is_an_error(play):
  with pytest.raises(ValueError, match="'turn'.*'token'"):
    estimators.gae(play(0).inputs(), reward_placement='token')


# EMPG.


def empg_loop(
  batch,
  *,
  normalize_std=True,
  scale=1.0,
  clarity_scale=1.0,
  clarity_bonus=0.1,
):
  entropy_BT = batch.arrays['entropy_BT'].astype(np.float64)
  advantage_B = group_relative_loop(batch, normalize_std=normalize_std)
  raw_BK = [
    [np.mean(entropy_BT[row, span_S]) for span_S in spans_K]
    for row, spans_K in enumerate(batch.spans_B)
  ]
  every = [h for raw_K in raw_BK for h in raw_K]
  low, high = min(every), max(every)
  norm_BK = [[(h - low) / (high - low + 1e-8) for h in r] for r in raw_BK]
  gains = [np.exp(-scale * h) for norm_K in norm_BK for h in norm_K]
  out_BK = []
  for advantage, norm_K in zip(advantage_B, norm_BK, strict=True):
    out_BK.append([])
    for k, h in enumerate(norm_K):
      number = advantage * np.exp(-scale * h) / np.mean(gains)
      if k + 1 < len(norm_K):
        number += clarity_bonus * np.exp(-clarity_scale * norm_K[k + 1])
      out_BK[-1].append(number)
  mean = np.mean([number for out_K in out_BK for number in out_K])
  return batch.paint([[number - mean for number in o] for o in out_BK])


def test_empg_by_hand():
  # Returns 7 and -7 of one group. Turn entropies 1, 3 (of 2 and 4) and 2:
  # normed 0, 1, 0.5. With scale log 4 the gains are 1, 1/4, 1/2, their mean
  # 7/12; with clarity scale log 2 turn 0 of row 0 has a bonus of zeta / 2 for
  # the turn after it.
  inputs = estimators.Inputs(
    return_PG=jnp.array([[7.0, -7.0]]),
    reward_BT=jnp.zeros((2, 4)),
    value_BT=None,
    entropy_BT=jnp.array([[1.0, 99.0, 2.0, 4.0], [2.0, -99.0, 0.0, 0.0]]),
    sampled_BT=jnp.array([[1, 0, 1, 1], [1, 0, 0, 0]]) > 0,
    turn_BT=jnp.array([[0, 1, 1, 1], [0, -1, -1, -1]]),
    anchor_BT=jnp.zeros((2, 4), jnp.int32),
    num_turns=3,
  )
  got = estimators.empg(
    inputs,
    normalize_std=False,
    scale=np.log(4.0),
    clarity_scale=np.log(2.0),
    clarity_bonus=6.0,
  )
  # Modulated: 12 + 3, 3, -6; their mean is 4.
  np.testing.assert_allclose(
    got.advantage_BT, [[11, 0, -1, -1], [-10, 0, 0, 0]], rtol=1e-5
  )


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize(
  'numbers',
  [
    dict(),
    dict(normalize_std=False, scale=3.0, clarity_scale=0.5, clarity_bonus=1.0),
  ],
)
def test_empg_against_a_loop(play, seed, numbers):
  batch = play(seed)
  got = compiled('empg')(batch.inputs(), **numbers)
  want_BT = empg_loop(batch, **numbers)
  np.testing.assert_allclose(got.advantage_BT, want_BT, atol=1e-5)


def test_empg_without_scale_and_bonus_only_takes_the_mean_of_turns_off(play):
  batch = play(1)
  row_B = group_relative_loop(batch)
  mean = np.mean(
    [row_B[row] for row, spans_K in enumerate(batch.spans_B) for _ in spans_K]
  )
  want_BK = [
    [row_B[row] - mean for _ in spans_K]
    for row, spans_K in enumerate(batch.spans_B)
  ]
  got = compiled('empg')(batch.inputs(), scale=0.0, clarity_bonus=0.0)
  np.testing.assert_allclose(got.advantage_BT, batch.paint(want_BK), atol=1e-5)
  # The mean over tokens is another number here.
  token_mean = np.mean(batch.paint(want_BK)[batch.arrays['sampled_BT']])
  assert abs(token_mean) > 1e-3


def test_empg_of_equal_entropies_is_as_if_without_scale(play):
  batch = play(3)
  batch.arrays['entropy_BT'][:] = 0.25
  with_scale, without = (
    compiled('empg')(batch.inputs(), scale=scale, clarity_bonus=0.0)
    for scale in (5.0, 0.0)
  )
  np.testing.assert_allclose(
    with_scale.advantage_BT, without.advantage_BT, atol=1e-6
  )


# Turn-level GAE.


def turn_gae_loop(batch, *, discount, lam):
  """The double sum of GAE over turns; also the values where turns begin."""
  advantage_BK, value_BK = [], []
  for row, reward_K in enumerate(batch.turn_rewards()):
    starts = [span_S[0] for span_S in batch.spans_B[row]]
    value_K = [float(batch.arrays['value_BT'][row, t]) for t in starts]
    next_K = [*value_K[1:], 0.0]
    delta_K = [
      r + discount * after - v
      for r, after, v in zip(reward_K, next_K, value_K, strict=True)
    ]
    advantage_BK.append(
      [
        sum((discount * lam) ** n * d for n, d in enumerate(delta_K[k:]))
        for k in range(len(delta_K))
      ]
    )
    value_BK.append(value_K)
  return advantage_BK, value_BK


def test_turn_gae_by_hand():
  # Values 4 and 2 where the turns begin, rewards 1 and 6, both numbers 0.5.
  # Turn 1: 6 - 2 = 4.  Turn 0: 1 + 0.5 * 2 - 4 + 0.25 * 4 = -1.
  sampled_BT = jnp.array([[0, 1, 1, 0, 1, 0]]) > 0
  inputs = estimators.Inputs(
    return_PG=jnp.array([[7.0]]),
    reward_BT=jnp.array([[0.0, 0.0, 1.0, 0.0, 6.0, 0.0]]),
    value_BT=jnp.array([[9.0, 4.0, 9.0, 9.0, 2.0, 9.0]]),
    entropy_BT=jnp.zeros((1, 6)),
    sampled_BT=sampled_BT,
    turn_BT=jnp.array([[-1, 0, 0, 1, 1, -1]]),
    anchor_BT=jnp.zeros((1, 6), jnp.int32),
    num_turns=3,
  )
  got = estimators.turn_gae(inputs, discount=0.5, lam=0.5)
  np.testing.assert_allclose(
    got.advantage_BT, white([[0, -1, -1, 0, 4, 0]], sampled_BT), atol=1e-6
  )
  np.testing.assert_allclose(got.return_BT, [[0, 3, 0, 0, 6, 0]])
  np.testing.assert_array_equal(got.critic_BT, [[0, 1, 0, 0, 1, 0]])


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize(('discount', 'lam'), [(0.99, 0.9), (0.7, 0.3), (1, 0)])
def test_turn_gae_against_a_loop(play, seed, discount, lam):
  batch = play(seed)
  got = compiled('turn_gae')(batch.inputs(), discount=discount, lam=lam)
  advantage_BK, value_BK = turn_gae_loop(batch, discount=discount, lam=lam)
  want_BT = white(batch.paint(advantage_BK), batch.arrays['sampled_BT'])
  np.testing.assert_allclose(got.advantage_BT, want_BT, atol=1e-5)
  starts = 0
  for row, spans_K in enumerate(batch.spans_B):
    for k, span_S in enumerate(spans_K):
      want = advantage_BK[row][k] + value_BK[row][k]
      np.testing.assert_allclose(got.return_BT[row, span_S[0]], want, atol=1e-5)
      assert got.critic_BT[row, span_S[0]]
      starts += 1
  assert int(got.critic_BT.sum()) == starts
  assert not np.any(got.return_BT[~got.critic_BT])


def test_turn_gae_defaults_are_those_of_its_paper(play):
  batch = play(0)
  by_default, of_paper = (
    estimators.turn_gae(batch.inputs(), **numbers).return_BT
    for numbers in ({}, dict(discount=0.99, lam=0.9))
  )
  np.testing.assert_array_equal(by_default, of_paper)


def test_turn_gae_of_one_token_turns_is_the_token_gae(play):
  batch = play(3)
  one_BT = np.zeros_like(batch.arrays['sampled_BT'])
  for row, spans_K in enumerate(batch.spans_B):
    one_BT[row, [span_S[-1] for span_S in spans_K]] = True  # Rewards are here.
  batch.arrays['sampled_BT'][:] = one_BT
  numbers = dict(discount=0.9, lam=0.7)
  want = estimators.gae(batch.inputs(), reward_placement='turn', **numbers)
  got = estimators.turn_gae(batch.inputs(), **numbers)
  for found, wanted in zip(got, want, strict=True):
    np.testing.assert_allclose(found, wanted, atol=1e-5)


# All of them.


@pytest.mark.parametrize('name', ESTIMATORS)
def test_credit_is_float32_and_zero_off_sampled_tokens(play, name):
  inputs = play(3).inputs()
  has_critic = ESTIMATORS[name].algo == 'ppo'
  assert has_critic == (name in CRITIC)
  if not has_critic:
    inputs = inputs.replace(value_BT=None)
  credit = compiled(name)(inputs)
  off_BT = ~np.asarray(inputs.sampled_BT)
  assert credit.advantage_BT.dtype == jnp.float32
  assert np.isfinite(credit.advantage_BT).all()
  assert np.abs(credit.advantage_BT).max() > 0.1
  assert not np.any(credit.advantage_BT[off_BT])
  assert (credit.return_BT is not None) == has_critic
  assert (credit.critic_BT is not None) == has_critic
  if has_critic:
    assert credit.return_BT.dtype == jnp.float32
    assert credit.critic_BT.dtype == bool
    assert not np.any(credit.critic_BT[off_BT])


@pytest.mark.parametrize('name', ESTIMATORS)
def test_nothing_sampled_gives_zero_and_no_nan(play, name):
  batch = play(3)
  for part in ('sampled', 'reward'):
    batch.arrays[f'{part}_BT'][:] = 0
  inputs = batch.inputs()
  credit = compiled(name)(inputs)
  np.testing.assert_array_equal(credit.advantage_BT, 0 * inputs.value_BT)
  if name in CRITIC:
    assert not np.any(credit.return_BT)
    assert not np.any(credit.critic_BT)


@pytest.mark.parametrize('name', ['empg', 'turn_gae'])
def test_padding_garbage_and_spare_turns_change_nothing(play, lengthen, name):
  batch = play(4)
  clean = compiled(name)(batch.inputs())
  dirty = compiled(name)(lengthen(batch).inputs(num_turns=K + 3))
  for clean_BT, dirty_BT in zip(clean, dirty, strict=True):
    if clean_BT is not None:
      padded_BT = np.pad(clean_BT, ((0, 0), (0, 7)))
      np.testing.assert_allclose(dirty_BT, padded_BT, atol=1e-5)


@pytest.mark.parametrize('name', ESTIMATORS)
def test_credit_is_a_constant_for_differentiation(play, name):
  inputs = play(0).inputs()

  def total(value_BT, entropy_BT):
    changed = inputs.replace(value_BT=value_BT, entropy_BT=entropy_BT)
    credit = compiled(name)(changed)
    target_BT = 0.0 if credit.return_BT is None else credit.return_BT
    return jnp.sum(credit.advantage_BT**2) + jnp.sum(target_BT**2)

  gradients = jax.grad(total, (0, 1))(inputs.value_BT, inputs.entropy_BT)
  assert not np.any(gradients)


@pytest.mark.parametrize('name', ESTIMATORS)
def test_a_misspelt_number_is_an_error(play, name):
  with pytest.raises(TypeError, match='dicsount'):
    ESTIMATORS[name].compute(play(0).inputs(), dicsount=0.5)
