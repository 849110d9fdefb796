"""EMPG and turn-level GAE: goldens, loops in float64, known cases.

GiGPO has a file of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import advantages, turn_advantages

K = 4

modulated = jax.jit(
  turn_advantages.entropy_modulated, static_argnames='num_turns'
)
turn_gae = jax.jit(turn_advantages.turn_gae, static_argnames='num_turns')


def off(batch):
  return ~batch.arrays['sampled_BT']


# EMPG.


def row_advantages(batch, seed=0):
  """An advantage per row, on sampled tokens, NaN elsewhere."""
  rng = np.random.default_rng(seed)
  advantage_B1 = rng.normal(size=(len(batch.spans_B), 1)).astype(np.float32)
  return np.where(batch.arrays['sampled_BT'], advantage_B1, np.nan)


def run_empg(batch, advantage_BT, *, num_turns=K, **numbers):
  arrays = batch.take('entropy', 'sampled', 'turn')
  advantage_BT = jnp.array(advantage_BT, jnp.float32)
  return modulated(advantage_BT, *arrays, num_turns=num_turns, **numbers)


def empg_loop(
  batch, advantage_BT, *, scale=1.0, clarity_scale=1.0, clarity_bonus=0.1
):
  entropy_BT = batch.arrays['entropy_BT'].astype(np.float64)
  raw_BK = [
    [np.mean(entropy_BT[row, span_S]) for span_S in spans_K]
    for row, spans_K in enumerate(batch.spans_B)
  ]
  every = [h for raw_K in raw_BK for h in raw_K]
  low, high = min(every), max(every)
  norm_BK = [[(h - low) / (high - low + 1e-8) for h in r] for r in raw_BK]
  gains = [np.exp(-scale * h) for norm_K in norm_BK for h in norm_K]
  out_BK = []
  for row, norm_K in enumerate(norm_BK):
    advantage = float(advantage_BT[row, batch.spans_B[row][0][0]])
    out_BK.append([])
    for k, h in enumerate(norm_K):
      number = advantage * np.exp(-scale * h) / np.mean(gains)
      if k + 1 < len(norm_K):
        number += clarity_bonus * np.exp(-clarity_scale * norm_K[k + 1])
      out_BK[-1].append(number)
  mean = np.mean([number for out_K in out_BK for number in out_K])
  return batch.paint([[number - mean for number in o] for o in out_BK])


def test_empg_by_hand():
  # Turn entropies 1, 3 (of 2 and 4) and 2: normed 0, 1, 0.5. With scale
  # log 4 the gains are 1, 1/4, 1/2, their mean 7/12; with clarity scale log 2
  # turn 0 of row 0 has a bonus of zeta / 2 for the turn after it.
  advantage_BT = jnp.array([[7.0, 7.0, 7.0, 7.0], [-7.0, 0.0, 0.0, 0.0]])
  entropy_BT = jnp.array([[1.0, 99.0, 2.0, 4.0], [2.0, -99.0, 0.0, 0.0]])
  sampled_BT = jnp.array([[1, 0, 1, 1], [1, 0, 0, 0]]) > 0
  turn_BT = jnp.array([[0, 1, 1, 1], [0, -1, -1, -1]])
  got_BT = modulated(
    advantage_BT,
    entropy_BT,
    sampled_BT,
    turn_BT,
    num_turns=3,
    scale=np.log(4.0),
    clarity_scale=np.log(2.0),
    clarity_bonus=6.0,
  )
  # Modulated: 12 + 3, 3, -6; their mean is 4.
  np.testing.assert_allclose(
    got_BT, [[11, 0, -1, -1], [-10, 0, 0, 0]], rtol=1e-5
  )


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize(
  'numbers',
  [dict(), dict(scale=3.0, clarity_scale=0.5, clarity_bonus=1.0)],
)
def test_empg_against_a_loop(play, seed, numbers):
  batch = play(seed)
  advantage_BT = row_advantages(batch, seed)
  got_BT = run_empg(batch, advantage_BT, **numbers)
  want_BT = empg_loop(batch, advantage_BT, **numbers)
  np.testing.assert_allclose(got_BT, want_BT, atol=1e-5)
  assert got_BT.dtype == jnp.float32


def test_empg_without_scale_and_bonus_only_takes_the_mean_of_turns_off(play):
  batch = play(1)
  advantage_BT = row_advantages(batch)
  numbers = [a for a, spans in zip(advantage_BT, batch.spans_B, strict=True)]
  turn_numbers = [
    numbers[row][span_S[0]]
    for row, spans_K in enumerate(batch.spans_B)
    for span_S in spans_K
  ]
  want_BT = np.where(off(batch), 0, advantage_BT - np.mean(turn_numbers))
  got_BT = run_empg(batch, advantage_BT, scale=0.0, clarity_bonus=0.0)
  np.testing.assert_allclose(got_BT, want_BT, atol=1e-5)
  # The mean over tokens is another number here.
  assert abs(np.mean(turn_numbers) - np.nanmean(advantage_BT)) > 1e-3


def test_empg_has_mean_zero_over_turns_whatever_the_numbers(play):
  batch = play(2)
  got_BT = run_empg(batch, row_advantages(batch), scale=2.0, clarity_bonus=3.0)
  firsts = [
    float(got_BT[row, span_S[0]])
    for row, spans_K in enumerate(batch.spans_B)
    for span_S in spans_K
  ]
  assert max(firsts) > 0.1
  np.testing.assert_allclose(np.mean(firsts), 0, atol=1e-6)


def test_empg_of_equal_entropies_is_as_if_without_scale(play):
  batch = play(3)
  batch.arrays['entropy_BT'][:] = 0.25
  advantage_BT = row_advantages(batch)
  np.testing.assert_allclose(
    run_empg(batch, advantage_BT, scale=5.0, clarity_bonus=0.0),
    run_empg(batch, advantage_BT, scale=0.0, clarity_bonus=0.0),
    atol=1e-6,
  )


# Turn-level GAE.


def run_turn_gae(batch, *, num_turns=K, **numbers):
  arrays = batch.take('reward', 'value', 'sampled', 'turn')
  return turn_gae(*arrays, num_turns=num_turns, **numbers)


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
  advantage_BT, return_BT, critic_BT = turn_gae(
    jnp.array([[0.0, 0.0, 1.0, 0.0, 6.0, 0.0]]),
    jnp.array([[9.0, 4.0, 9.0, 9.0, 2.0, 9.0]]),
    jnp.array([[0, 1, 1, 0, 1, 0]]) > 0,
    jnp.array([[-1, 0, 0, 1, 1, -1]]),
    num_turns=3,
    discount=0.5,
    lam=0.5,
  )
  np.testing.assert_allclose(advantage_BT, [[0, -1, -1, 0, 4, 0]])
  np.testing.assert_allclose(return_BT, [[0, 3, 0, 0, 6, 0]])
  np.testing.assert_array_equal(critic_BT, [[0, 1, 0, 0, 1, 0]])
  assert critic_BT.dtype == bool


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize(('discount', 'lam'), [(0.99, 0.9), (0.7, 0.3), (1, 0)])
def test_turn_gae_against_a_loop(play, seed, discount, lam):
  batch = play(seed)
  got_BT, return_BT, critic_BT = run_turn_gae(batch, discount=discount, lam=lam)
  advantage_BK, value_BK = turn_gae_loop(batch, discount=discount, lam=lam)
  np.testing.assert_allclose(got_BT, batch.paint(advantage_BK), atol=1e-5)
  starts = 0
  for row, spans_K in enumerate(batch.spans_B):
    for k, span_S in enumerate(spans_K):
      want = advantage_BK[row][k] + value_BK[row][k]
      np.testing.assert_allclose(return_BT[row, span_S[0]], want, atol=1e-5)
      assert critic_BT[row, span_S[0]]
      starts += 1
  assert int(critic_BT.sum()) == starts
  assert not np.any(return_BT[~critic_BT])


def test_turn_gae_defaults_are_those_of_its_paper(play):
  batch = play(0)
  advantage_BK, _ = turn_gae_loop(batch, discount=0.99, lam=0.9)
  got_BT, _, _ = run_turn_gae(batch)
  np.testing.assert_allclose(got_BT, batch.paint(advantage_BK), atol=1e-5)


def test_turn_gae_with_lambda_one_is_return_to_go_minus_value(play):
  batch = play(1)
  got_BT, return_BT, _ = run_turn_gae(batch, discount=1.0, lam=1.0)
  for row, reward_K in enumerate(batch.turn_rewards()):
    for k, span_S in enumerate(batch.spans_B[row]):
      to_go, first = sum(reward_K[k:]), span_S[0]
      value = batch.arrays['value_BT'][row, first]
      np.testing.assert_allclose(got_BT[row, first], to_go - value, atol=1e-5)
      np.testing.assert_allclose(return_BT[row, first], to_go, atol=1e-5)


def test_turn_gae_of_one_turn_is_reward_minus_value(play):
  batch = play(2, most_turns=1)
  reward_BK = batch.turn_rewards()
  firsts = [spans_K[0][0] for spans_K in batch.spans_B]
  value_BT = batch.arrays['value_BT']
  want_BK = [
    [reward_BK[row][0] - value_BT[row, t]] for row, t in enumerate(firsts)
  ]
  for lam in (0.0, 0.9):
    got_BT, _, _ = run_turn_gae(batch, discount=0.5, lam=lam)
    np.testing.assert_allclose(got_BT, batch.paint(want_BK), atol=1e-6)


def test_turn_gae_of_one_token_turns_is_the_token_gae(play):
  batch = play(3)
  one_BT = np.zeros_like(batch.arrays['sampled_BT'])
  for row, spans_K in enumerate(batch.spans_B):
    one_BT[row, [span_S[-1] for span_S in spans_K]] = True  # Rewards are here.
  batch.arrays['sampled_BT'][:] = one_BT
  want = advantages.gae(
    *batch.take('reward', 'value', 'sampled'), discount=0.9, lam=0.7
  )
  *got, critic_BT = run_turn_gae(batch, discount=0.9, lam=0.7)
  np.testing.assert_allclose(got, want, atol=1e-6)
  np.testing.assert_array_equal(critic_BT, one_BT)


# Both of them.


def every(batch, **numbers):
  advantage_BT = row_advantages(batch)
  return [
    run_empg(batch, advantage_BT, **numbers),
    *run_turn_gae(batch, **numbers),
  ]


def test_padding_garbage_and_spare_turns_change_nothing(play, lengthen):
  batch = play(4)
  clean = every(batch)
  dirty = every(lengthen(batch), num_turns=K + 3)
  for clean_BT, dirty_BT in zip(clean, dirty, strict=True):
    padded_BT = np.pad(clean_BT, ((0, 0), (0, 7)))
    np.testing.assert_allclose(dirty_BT, padded_BT, atol=1e-5)
    assert not np.any(clean_BT[off(batch)])


def test_both_are_constants_for_differentiation(play):
  batch = play(0)
  reward_BT, value_BT, entropy_BT, sampled_BT, turn_BT = batch.take(
    'reward', 'value', 'entropy', 'sampled', 'turn'
  )

  def total(value_BT, entropy_BT, advantage_BT):
    advantage, target, _ = turn_gae(
      reward_BT, value_BT, sampled_BT, turn_BT, num_turns=K
    )
    outcome = modulated(
      advantage_BT, entropy_BT, sampled_BT, turn_BT, num_turns=K
    )
    return jnp.sum(advantage**2) + jnp.sum(target**2) + jnp.sum(outcome**2)

  gradients = jax.grad(total, (0, 1, 2))(value_BT, entropy_BT, reward_BT)
  assert not np.any(gradients)


def test_shapes_are_checked(play):
  reward_BT, sampled_BT, turn_BT = play(0).take('reward', 'sampled', 'turn')
  short_BT = reward_BT[:, :-1]
  with pytest.raises(AssertionError):
    modulated(reward_BT, short_BT, sampled_BT, turn_BT, num_turns=K)
  with pytest.raises(AssertionError):
    turn_gae(reward_BT, short_BT, sampled_BT, turn_BT, num_turns=K)
