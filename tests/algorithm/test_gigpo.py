"""GiGPO: goldens, a loop in float64, reductions to GRPO."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import estimators

K = 4


@functools.partial(jax.jit, static_argnames='normalize_std')
def compiled(inputs, **numbers):
  return estimators.gigpo(inputs, **numbers).advantage_BT


def gigpo(
  reward_BT, sampled_BT, turn_BT, anchor_BT, *, members, num_turns, **kw
):
  """Of arrays by hand; of the returns only the number of members is read."""
  inputs = estimators.Inputs(
    return_PG=jnp.zeros((len(reward_BT) // members, members)),
    reward_BT=reward_BT,
    value_BT=None,
    entropy_BT=jnp.zeros_like(reward_BT),
    sampled_BT=sampled_BT,
    turn_BT=turn_BT,
    anchor_BT=anchor_BT,
    num_turns=num_turns,
  )
  return compiled(inputs, **kw)


def relative(value, others, *, normalize_std, eps=1e-6):
  """`value` among `others`; 0 where these are alike."""
  mean = sum(others) / len(others)
  if max(abs(x - mean) for x in others) < 1e-9:
    return 0.0
  if not normalize_std:
    return value - mean
  variance = sum((x - mean) ** 2 for x in others) / (len(others) - 1)
  return (value - mean) / (np.sqrt(variance) + eps)


def run_gigpo(batch, *, members=4, num_turns=K, **numbers):
  return compiled(batch.inputs(members, num_turns), **numbers)


def gigpo_loop(
  batch, *, members=4, normalize_std=True, step_weight=1.0, discount=0.95
):
  reward_BK = batch.turn_rewards()
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
  return batch.paint(out_BK)


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


def grpo(batch):
  return estimators.group_relative(batch.inputs()).advantage_BT


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


def test_padding_garbage_and_spare_turns_change_nothing(play, lengthen):
  batch = play(4)
  clean_BT = run_gigpo(batch)
  dirty_BT = run_gigpo(lengthen(batch), num_turns=K + 3)
  padded_BT = np.pad(clean_BT, ((0, 0), (0, 7)))
  np.testing.assert_allclose(dirty_BT, padded_BT, atol=1e-5)
  assert not np.any(clean_BT[~batch.arrays['sampled_BT']])


def test_a_lost_episode_moves_no_baseline():
  """Returns 1 and 0 and the mean of both: the two stand at +-1/2."""
  reward_BT = jnp.array([[0.0, 1.0], [0.0, 0.0], [0.0, 0.5]])
  sampled_BT = jnp.array([[False, True], [False, True], [False, False]])
  turn_BT = jnp.where(sampled_BT, 0, -1)
  advantage_BT = gigpo(
    reward_BT,
    sampled_BT,
    turn_BT,
    jnp.zeros_like(turn_BT),
    members=3,
    num_turns=1,
    normalize_std=False,
    step_weight=0.0,
  )
  np.testing.assert_allclose(advantage_BT[:, 1], [0.5, -0.5, 0.0], atol=1e-6)
