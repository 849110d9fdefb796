"""Masked reductions, row gathers, and the check of a batch that tests use."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trajectory_check import check_trajectory

from actfocus_jax.algorithm import trajectory


def episodes():
  """Two rows of two turns; the second turn of row 1 is one stop token."""
  kinds = ('ppoSAAsoSA.', 'ppSAsos....')
  kind_BT = np.array([list(kind) for kind in kinds])
  reward_BT = np.zeros(kind_BT.shape, np.float32)
  reward_BT[0, [6, 9]] = -0.1, 1.0
  reward_BT[1, [4, 6]] = 0.25, 0.5
  turn_end_BT = reward_BT != 0
  turn_BT = np.full(kind_BT.shape, -1, np.int32)
  turn_BT[0, 2:7], turn_BT[0, 7:10] = 0, 1
  turn_BT[1, 2:5], turn_BT[1, 5:7] = 0, 1
  sampled_BT = np.isin(kind_BT, ['S', 'A', 's'])
  return trajectory.Trajectory(
    tokens=np.arange(22, dtype=np.int32).reshape(2, 11),
    valid=kind_BT != '.',
    sampled=sampled_BT,
    action=kind_BT == 'A',
    turn=turn_BT,
    turn_end=turn_end_BT,
    anchor=np.where(turn_BT >= 0, 7 + turn_BT, 0).astype(np.int32),
    logprob=np.where(sampled_BT, -0.5, 0.0).astype(np.float32),
    reward=reward_BT,
    group=np.array([0, 0], np.int32),
    success=np.array([True, False]),
  )


def test_sum_count_by_hand_and_in_float32():
  ones_BT = jnp.ones((4, 300), jnp.bfloat16)  # It counts to 256.
  total, _ = trajectory.masked_sum_count(ones_BT, ones_BT > 0)
  assert float(total) == 1200.0
  x_BT = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], jnp.bfloat16)
  mask_BT = jnp.array([[True, False, True], [False, True, False]])
  total, count = trajectory.masked_sum_count(x_BT, mask_BT)
  assert (float(total), float(count)) == (21.0, 3.0)
  chex.assert_type([total, count], jnp.float32)
  assert float(trajectory.masked_mean(x_BT, mask_BT)) == 7.0


def test_nan_off_the_mask_reaches_neither_value_nor_gradient():
  x_BT = jnp.array([[1.0, jnp.nan, 3.0]])
  mask_BT = jnp.array([[True, False, True]])
  value, gradient_BT = jax.value_and_grad(trajectory.masked_mean)(x_BT, mask_BT)
  assert float(value) == 2.0
  np.testing.assert_array_equal(gradient_BT, [[0.5, 0.0, 0.5]])


def test_empty_mask_gives_zero_and_no_gradient():
  x_BT = jnp.full((2, 3), 5.0)
  none_BT = jnp.zeros((2, 3), bool)
  value, gradient_BT = jax.value_and_grad(trajectory.masked_mean)(x_BT, none_BT)
  assert float(value) == 0.0
  np.testing.assert_array_equal(gradient_BT, np.zeros((2, 3)))
  assert [float(m) for m in trajectory.masked_moments(x_BT, none_BT)] == [0, 0]


def test_divide_is_exact_for_small_weights():
  # One thought token at alpha = 0.001 is still a mean, not a floor.
  np.testing.assert_allclose(
    trajectory.divide(jnp.float32(0.002), jnp.float32(0.001)), 2.0, rtol=1e-6
  )


def test_moments_match_numpy_in_float64():
  rng = np.random.default_rng(0)
  x_BT = (100 + rng.normal(size=(5, 40))).astype(np.float32)
  mask_BT = rng.random((5, 40)) < 0.3
  mean, variance = trajectory.masked_moments(jnp.array(x_BT), mask_BT)
  chosen = x_BT[mask_BT].astype(np.float64)
  np.testing.assert_allclose(mean, chosen.mean(), rtol=1e-6)
  np.testing.assert_allclose(variance, chosen.var(), rtol=1e-4)


@pytest.mark.parametrize('constant', [-1.1, 0.3, 1234.567])
def test_moments_of_equal_numbers_are_exact(constant):
  x_BT = jnp.full((7, 143), constant, jnp.float32)
  moments = jax.jit(trajectory.masked_moments)(x_BT, x_BT == x_BT)
  assert [float(m) for m in moments] == [float(np.float32(constant)), 0.0]


def test_episode_return_sums_the_rewards_of_a_row():
  batch = jax.tree.map(jnp.asarray, episodes())
  np.testing.assert_allclose(
    trajectory.episode_return(batch), [0.9, 0.75], rtol=1e-6
  )


def test_take_rows_gathers_every_field_under_jit():
  batch = jax.tree.map(jnp.asarray, episodes())
  taken = jax.jit(trajectory.take_rows)(batch, jnp.array([1, 0, 1]))
  for before, after in zip(
    jax.tree.leaves(episodes()), jax.tree.leaves(taken), strict=True
  ):
    np.testing.assert_array_equal(after, before[[1, 0, 1]])
    assert after.dtype == before.dtype


def test_check_accepts_good_batches_of_either_kind():
  check_trajectory(episodes())
  check_trajectory(jax.tree.map(jnp.asarray, episodes()))


# field, row, token, new value, what the error must say
BROKEN = [
  ('valid', 0, 1, False, 'prefix'),
  ('sampled', 0, 10, True, 'not valid'),
  ('action', 0, 7, True, 'not sampled'),
  ('sampled', 0, 0, True, 'first token'),
  ('turn', 0, 10, 1, 'padding'),
  ('turn', 0, 0, -2, 'below'),
  ('turn', 1, 6, -1, 'no turn'),
  ('turn', 0, 2, 1, 'decreases'),
  ('turn_end', 0, 6, False, 'turn_end'),
  ('turn_end', 0, 5, True, 'turn_end'),
  ('sampled', 0, 7, True, 'turn_end'),
  ('reward', 0, 5, 0.5, 'off the turn ends'),
  ('reward', 0, 6, np.nan, 'reward is not finite'),
  ('logprob', 0, 3, -np.inf, 'logprob is not finite'),
  ('logprob', 0, 7, -1.0, 'not sampled has a logprob'),
]


@pytest.mark.parametrize(('field', 'row', 'token', 'value', 'words'), BROKEN)
def test_check_names_the_broken_promise(field, row, token, value, words):
  batch = episodes()
  getattr(batch, field)[row, token] = value
  if words == 'turn_end' and field == 'sampled':
    batch.turn_end[0, 6] = True
    batch.sampled[0, 10] = False
    batch.turn[0, 7] = 0  # The observation was sampled, after the turn's end.
  with pytest.raises(ValueError, match=f'{words}.*row {row}, token'):
    check_trajectory(batch)


def test_check_names_the_field_of_wrong_layout():
  whole = dataclasses.replace(episodes(), reward=np.zeros((2, 11), np.int32))
  with pytest.raises(ValueError, match='reward is int32, not float32'):
    check_trajectory(whole)
  flat = dataclasses.replace(episodes(), anchor=np.zeros(2, np.int32))
  with pytest.raises(ValueError, match='anchor has shape'):
    check_trajectory(flat)
