"""Estimators by turn: goldens, loops in float64, reductions to known cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import advantages, turn_advantages

K = 4
STATIC = ('members', 'num_turns', 'normalize_std')

gigpo = jax.jit(turn_advantages.gigpo, static_argnames=STATIC)
modulated = jax.jit(turn_advantages.entropy_modulated, static_argnames=STATIC)
turn_gae = jax.jit(turn_advantages.turn_gae, static_argnames=STATIC)


def off(batch):
  return ~batch.arrays['sampled_BT']


def turn_rewards(batch):
  """Reward of each turn of each row, as ragged lists of Python floats."""
  reward_BT = batch.arrays['reward_BT'].astype(np.float64)
  return [
    [sum(reward_BT[row, t] for t in span_S) for span_S in spans_K]
    for row, spans_K in enumerate(batch.spans_B)
  ]


def paint(batch, numbers_BK):
  """Each number on the sampled tokens of its turn, float64."""
  out_BT = np.zeros(batch.arrays['sampled_BT'].shape)
  for row, spans_K in enumerate(batch.spans_B):
    for span_S, number in zip(spans_K, numbers_BK[row], strict=True):
      out_BT[row, span_S] = number
  return out_BT


def relative(value, others, *, normalize_std, eps=1e-6):
  """`value` among `others`; 0 where these are alike."""
  mean = sum(others) / len(others)
  if max(abs(x - mean) for x in others) < 1e-9:
    return 0.0
  if not normalize_std:
    return value - mean
  variance = sum((x - mean) ** 2 for x in others) / (len(others) - 1)
  return (value - mean) / (np.sqrt(variance) + eps)


# GiGPO.


def run_gigpo(batch, *, members=4, num_turns=K, **numbers):
  arrays = batch.take('reward', 'sampled', 'turn', 'anchor')
  return gigpo(*arrays, members=members, num_turns=num_turns, **numbers)


def gigpo_loop(
  batch, *, members=4, normalize_std=True, step_weight=1.0, discount=0.95
):
  reward_BK = turn_rewards(batch)
  anchor_BT = batch.arrays['anchor_BT']
  out_BK = [[0.0] * len(reward_K) for reward_K in reward_BK]
  for first in range(0, len(reward_BK), members):
    rows = range(first, first + members)
    returns = [sum(reward_BK[row]) for row in rows]
    met = {}  # Anchor to the returns from there on.
    for row in rows:
      for k, span_S in enumerate(batch.spans_B[row]):
        later = enumerate(reward_BK[row][k:])
        later = sum(discount**n * reward for n, reward in later)
        met.setdefault(anchor_BT[row, span_S[0]], []).append((row, k, later))
    for steps in met.values():
      others = [later for _, _, later in steps]
      for row, k, later in steps:
        step = relative(later, others, normalize_std=normalize_std)
        episode = relative(
          sum(reward_BK[row]), returns, normalize_std=normalize_std
        )
        out_BK[row][k] = episode + step_weight * step
  return paint(batch, out_BK)


def test_gigpo_by_hand():
  # Two members; one token a turn. Rewards (0, 1) and (3, 0), discount 0.5:
  # later (0.5, 1) and (3, 0). State 7 is met with 0.5 and 3, state 8 with 1,
  # state 9 with 0. The returns are 1 and 3.
  reward_BT = jnp.array([[0.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
  sampled_BT = jnp.array([[False, True, True]] * 2)
  turn_BT = jnp.array([[-1, 0, 1]] * 2)
  anchor_BT = jnp.array([[0, 7, 8], [0, 7, 9]])
  compute = functools.partial(
    gigpo,
    reward_BT,
    sampled_BT,
    turn_BT,
    anchor_BT,
    members=2,
    num_turns=2,
    step_weight=2.0,
    discount=0.5,
  )
  np.testing.assert_allclose(
    compute(normalize_std=False), [[0, -1 - 2.5, -1], [0, 1 + 2.5, 1]]
  )
  half = np.sqrt(0.5)  # Two numbers lie so many deviations from their mean.
  np.testing.assert_allclose(
    compute(), [[0, -3 * half, -half], [0, 3 * half, half]], rtol=1e-5
  )


def test_gigpo_counts_a_turn_whose_reward_is_zero():
  # State 5 is met three times, with 0, 0 and 3: their mean is 1, not 3.
  reward_BT = jnp.array([[0.0, 0.0, 3.0]])
  all_BT = jnp.ones((1, 3), bool)
  turn_BT = jnp.array([[0, 1, 2]])
  advantage_BT = gigpo(
    reward_BT,
    all_BT,
    turn_BT,
    jnp.full((1, 3), 5),
    members=1,
    num_turns=3,
    normalize_std=False,
    discount=0.0,
  )
  np.testing.assert_allclose(advantage_BT, [[-1, -1, 2]], rtol=1e-6)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize(
  'numbers',
  [
    dict(),
    dict(normalize_std=False, step_weight=0.3, discount=1.0),
    dict(step_weight=2.0, discount=0.5),
  ],
)
def test_gigpo_against_a_loop(play, seed, numbers):
  batch = play(seed)
  want_BT = gigpo_loop(batch, **numbers)
  grpo_BT = gigpo_loop(batch, **dict(numbers, step_weight=0.0))
  assert np.abs(want_BT - grpo_BT).max() > 0.1
  got_BT = run_gigpo(batch, **numbers)
  np.testing.assert_allclose(got_BT, want_BT, atol=2e-5)
  assert got_BT.dtype == jnp.float32


def grpo(batch, members=4):
  returns_PG = jnp.array([sum(r) for r in turn_rewards(batch)], jnp.float32)
  advantage_PG = advantages.group_relative(returns_PG.reshape(-1, members))
  return advantages.broadcast(advantage_PG.reshape(-1), *batch.take('sampled'))


def test_gigpo_without_step_weight_is_grpo(play):
  batch = play(0)
  got_BT = run_gigpo(batch, step_weight=0.0)
  assert np.abs(got_BT).max() > 0.1
  np.testing.assert_allclose(got_BT, grpo(batch), atol=1e-5)


def test_gigpo_of_states_that_are_met_once_is_grpo(play):
  batch = play(1)
  anchor_BT = batch.arrays['anchor_BT']
  with_steps_BT = run_gigpo(batch)
  anchor_BT[:] = np.arange(anchor_BT.size).reshape(anchor_BT.shape)
  got_BT = run_gigpo(batch)
  assert np.abs(got_BT - with_steps_BT).max() > 0.1
  np.testing.assert_allclose(got_BT, grpo(batch), atol=1e-5)


def test_gigpo_does_not_compare_across_groups():
  # Both groups of one meet state 3, which would make a pair of them.
  advantage_BT = gigpo(
    jnp.array([[1.0], [-1.0]]),
    jnp.ones((2, 1), bool),
    jnp.zeros((2, 1), jnp.int32),
    jnp.full((2, 1), 3),
    members=1,
    num_turns=1,
  )
  np.testing.assert_array_equal(advantage_BT, [[0], [0]])


def test_gigpo_of_one_member_and_one_visit_is_zero(play):
  batch = play(2)
  batch.arrays['anchor_BT'] += 10 * np.maximum(batch.arrays['turn_BT'], 0)
  np.testing.assert_array_equal(run_gigpo(batch, members=1), 0 * grpo(batch))


@pytest.mark.parametrize('reward', [0.0, -1.1, 0.1])
@pytest.mark.parametrize('normalize_std', [True, False])
def test_gigpo_of_equal_returns_is_exactly_zero(reward, normalize_std):
  # Seven members, each paid at the end of its second turn, in equal states.
  reward_BT = jnp.tile(jnp.array([[0.0, reward]]), (7, 1))
  turn_BT = jnp.tile(jnp.array([[0, 1]]), (7, 1))
  advantage_BT = gigpo(
    reward_BT,
    jnp.ones((7, 2), bool),
    turn_BT,
    turn_BT,
    members=7,
    num_turns=2,
    normalize_std=normalize_std,
  )
  np.testing.assert_array_equal(advantage_BT, np.zeros((7, 2)))


def test_gigpo_does_not_blow_up_differences_of_rounding():
  value = np.float32(-1.1)
  near = np.nextafter(value, np.float32(0))
  assert near != value
  ones_BT = jnp.ones((2, 1), bool)
  zeros_BT = jnp.zeros((2, 1), jnp.int32)
  advantage_BT = gigpo(
    jnp.array([[value], [near]]),
    ones_BT,
    zeros_BT,
    zeros_BT,
    members=2,
    num_turns=1,
  )
  np.testing.assert_array_equal(advantage_BT, [[0], [0]])


def test_gigpo_follows_a_permutation_within_groups(play):
  batch = play(3)
  order_B = np.array([2, 0, 3, 1, 4, 7, 6, 5])
  before_BT = np.asarray(run_gigpo(batch))
  for name, x_BT in batch.arrays.items():
    batch.arrays[name] = x_BT[order_B]
  np.testing.assert_allclose(
    run_gigpo(batch), before_BT[order_B], atol=1e-5, rtol=1e-5
  )
  assert np.abs(before_BT[order_B] - before_BT).max() > 0.1


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
  return paint(batch, [[number - mean for number in o] for o in out_BK])


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
  for row, reward_K in enumerate(turn_rewards(batch)):
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
  np.testing.assert_allclose(got_BT, paint(batch, advantage_BK), atol=1e-5)
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
  np.testing.assert_allclose(got_BT, paint(batch, advantage_BK), atol=1e-5)


def test_turn_gae_with_lambda_one_is_return_to_go_minus_value(play):
  batch = play(1)
  got_BT, return_BT, _ = run_turn_gae(batch, discount=1.0, lam=1.0)
  for row, reward_K in enumerate(turn_rewards(batch)):
    for k, span_S in enumerate(batch.spans_B[row]):
      to_go, first = sum(reward_K[k:]), span_S[0]
      value = batch.arrays['value_BT'][row, first]
      np.testing.assert_allclose(got_BT[row, first], to_go - value, atol=1e-5)
      np.testing.assert_allclose(return_BT[row, first], to_go, atol=1e-5)


def test_turn_gae_of_one_turn_is_reward_minus_value(play):
  batch = play(2, most_turns=1)
  reward_BK = turn_rewards(batch)
  firsts = [spans_K[0][0] for spans_K in batch.spans_B]
  value_BT = batch.arrays['value_BT']
  want_BK = [
    [reward_BK[row][0] - value_BT[row, t]] for row, t in enumerate(firsts)
  ]
  for lam in (0.0, 0.9):
    got_BT, _, _ = run_turn_gae(batch, discount=0.5, lam=lam)
    np.testing.assert_allclose(got_BT, paint(batch, want_BK), atol=1e-6)


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


# All of them.


def every(batch, **numbers):
  advantage_BT = row_advantages(batch)
  return [
    run_gigpo(batch, **numbers),
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


def test_all_are_constants_for_differentiation(play):
  batch = play(0)
  reward_BT, value_BT, entropy_BT, sampled_BT, turn_BT, anchor_BT = batch.take(
    'reward', 'value', 'entropy', 'sampled', 'turn', 'anchor'
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
    gigpo(reward_BT, sampled_BT, turn_BT, short_BT, members=4, num_turns=K)
  with pytest.raises(AssertionError):
    modulated(reward_BT, short_BT, sampled_BT, turn_BT, num_turns=K)
  with pytest.raises(AssertionError):
    turn_gae(reward_BT, short_BT, sampled_BT, turn_BT, num_turns=K)
