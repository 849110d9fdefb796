"""Estimators by name: loops in float64, exact zeros, what all promise."""

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
@pytest.mark.parametrize('numbers', [dict(), dict(discount=0.9, lam=0.5)])
def test_gae_pays_where_the_placement_says(play, placement, numbers):
  inputs = play(1).inputs()
  got = estimators.gae(inputs, reward_placement=placement, **numbers)
  reward_BT = inputs.reward_BT
  if placement == 'final':
    reward_BT = advantages.on_last_token(
      inputs.return_PG.reshape(-1), inputs.sampled_BT
    )
    default = estimators.gae(inputs, **numbers)
    np.testing.assert_array_equal(default.return_BT, got.return_BT)
  advantage_BT, return_BT = advantages.gae(
    reward_BT, inputs.value_BT, inputs.sampled_BT, **numbers
  )
  np.testing.assert_allclose(got.return_BT, return_BT, atol=1e-5)
  np.testing.assert_allclose(
    got.advantage_BT, white(advantage_BT, inputs.sampled_BT), atol=1e-5
  )
  np.testing.assert_array_equal(got.critic_BT, inputs.sampled_BT)


def test_gae_of_an_unknown_placement_is_an_error(play):
  with pytest.raises(ValueError, match="'turn'.*'token'"):
    estimators.gae(play(0).inputs(), reward_placement='token')


# GiGPO.


def relative(value, others, *, normalize_std, eps=1e-6):
  """`value` among `others`; 0 where these are alike."""
  mean = sum(others) / len(others)
  if max(abs(x - mean) for x in others) < 1e-9:
    return 0.0
  if not normalize_std:
    return value - mean
  variance = sum((x - mean) ** 2 for x in others) / (len(others) - 1)
  return (value - mean) / (np.sqrt(variance) + eps)


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


@pytest.mark.parametrize('seed', range(2))
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
  got_BT = compiled('gigpo')(batch.inputs(), **numbers).advantage_BT
  np.testing.assert_allclose(got_BT, want_BT, atol=2e-5)


def inputs_of(reward_BT, sampled_BT, members, num_turns):
  """Arrays by hand: position t is turn t, in state t of the environment."""
  position_BT = jnp.tile(jnp.arange(reward_BT.shape[1]), (len(reward_BT), 1))
  return estimators.Inputs(
    return_PG=jnp.zeros((len(reward_BT) // members, members)),
    reward_BT=reward_BT,
    value_BT=None,
    entropy_BT=jnp.zeros_like(reward_BT),
    sampled_BT=sampled_BT,
    turn_BT=position_BT,
    anchor_BT=position_BT,
    num_turns=num_turns,
  )


@pytest.mark.parametrize('normalize_std', [True, False])
def test_gigpo_of_equal_returns_is_exactly_zero(normalize_std):
  """Of seven members, and of two whose rewards differ by rounding."""
  value = np.float32(-1.1)
  near = np.nextafter(value, np.float32(0))
  assert near != value
  for rewards in ([0.0] * 7, [-1.1] * 7, [0.1] * 7, [value, near]):
    reward_BT = jnp.array([[0.0, x] for x in rewards], jnp.float32)
    inputs = inputs_of(reward_BT, reward_BT == reward_BT, len(rewards), 2)
    got = estimators.gigpo(inputs, normalize_std=normalize_std)
    assert not np.any(got.advantage_BT)


def test_a_lost_episode_moves_no_baseline():
  """Returns 1 and 0 and the mean of both: the two stand at +-1/2."""
  reward_BT = jnp.array([[0.0, 1.0], [0.0, 0.0], [0.0, 0.5]])
  sampled_BT = jnp.array([[False, True], [False, True], [False, False]])
  inputs = inputs_of(reward_BT, sampled_BT, 3, 2)
  credit = estimators.gigpo(inputs, normalize_std=False, step_weight=0.0)
  np.testing.assert_allclose(
    credit.advantage_BT[:, 1], [0.5, -0.5, 0.0], atol=1e-6
  )


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


@pytest.mark.parametrize('seed', range(2))
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


# Turn-level GAE.


def turn_gae_loop(batch, *, discount=0.99, lam=0.9):
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


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('numbers', [dict(), dict(discount=0.7, lam=0.3)])
def test_turn_gae_against_a_loop(play, seed, numbers):
  batch = play(seed)
  got = compiled('turn_gae')(batch.inputs(), **numbers)
  advantage_BK, value_BK = turn_gae_loop(batch, **numbers)
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


@pytest.mark.parametrize('name', ['gigpo', 'empg', 'turn_gae'])
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
