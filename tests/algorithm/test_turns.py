"""Turns to numbers and back: loops over spans, what is not read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import turns

K = 5  # One more than any episode of `play` has.

# Prompt, an observation, turn 0 with a forced token inside, an observation,
# turn 1, padding.
TURN_BT = jnp.array([[-1, 0, 0, 0, 0, 1, 1, -1]])
MASK_BT = jnp.array([[0, 0, 1, 0, 1, 0, 1, 0]]) > 0
X_BT = jnp.array([[9.0, 9.0, 1.0, 9.0, 4.0, 9.0, 7.0, 9.0]])


@pytest.mark.parametrize('seed', range(2))
def test_against_a_loop_over_spans(play, seed):
  batch = play(seed)
  x_BT, mask_BT, turn_BT = batch.take('value', 'sampled', 'turn')
  want = {name: np.zeros((8, K)) for name in ('sum', 'count', 'mean', 'pick')}
  first_BT = np.zeros(x_BT.shape, bool)
  for row, spans_K in enumerate(batch.spans_B):
    for k, span_S in enumerate(spans_K):
      values = [float(x_BT[row, t]) for t in span_S]
      want['sum'][row, k] = sum(values)
      want['count'][row, k] = len(values)
      want['mean'][row, k] = sum(values) / len(values)
      want['pick'][row, k] = values[0]
      first_BT[row, span_S[0]] = True
  np.testing.assert_array_equal(turns.first(mask_BT, turn_BT), first_BT)
  got = dict(
    zip(
      ('sum', 'count'),
      turns.total(x_BT, mask_BT, turn_BT, turns=K),
      strict=True,
    ),
    mean=turns.mean(x_BT, mask_BT, turn_BT, turns=K),
    pick=turns.pick(x_BT, jnp.array(first_BT), turn_BT, turns=K),
  )
  for name, want_BK in want.items():
    np.testing.assert_allclose(got[name], want_BK, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('seed', range(3))
def test_spread_against_a_loop_and_its_mean_is_itself(play, seed):
  batch = play(seed)
  mask_BT, turn_BT = batch.take('sampled', 'turn')
  x_BK = np.random.default_rng(seed).normal(size=(8, K)).astype(np.float32)
  want_BT = np.zeros(mask_BT.shape, np.float32)
  exists_BK = np.zeros((8, K), bool)
  for row, spans_K in enumerate(batch.spans_B):
    for k, span_S in enumerate(spans_K):
      want_BT[row, span_S] = x_BK[row, k]
      exists_BK[row, k] = True
  got_BT = jax.jit(turns.spread)(jnp.array(x_BK), mask_BT, turn_BT)
  np.testing.assert_array_equal(got_BT, want_BT)
  back_BK = turns.mean(got_BT, mask_BT, turn_BT, turns=K)
  np.testing.assert_allclose(back_BK, np.where(exists_BK, x_BK, 0), rtol=1e-6)


def test_garbage_off_the_mask_and_padding_change_nothing(play, lengthen):
  batch = play(3)
  dirty = lengthen(batch)
  assert np.isnan(dirty.arrays['value_BT']).any()

  def compute(batch):
    x_BT, mask_BT, turn_BT = batch.take('value', 'sampled', 'turn')
    first_BT = turns.first(mask_BT, turn_BT)
    return [
      *turns.total(x_BT, mask_BT, turn_BT, turns=K),
      turns.mean(x_BT, mask_BT, turn_BT, turns=K),
      turns.pick(x_BT, first_BT, turn_BT, turns=K),
    ], first_BT

  clean, first_BT = compute(batch)
  got, got_first_BT = compute(dirty)
  for got_BK, clean_BK in zip(got, clean, strict=True):
    np.testing.assert_allclose(got_BK, clean_BK, rtol=1e-6)
  np.testing.assert_array_equal(
    got_first_BT, np.pad(first_BT, ((0, 0), (0, 7)))
  )


def test_nan_off_the_mask_reaches_no_gradient():
  x_BT = jnp.where(MASK_BT, X_BT, jnp.nan)

  def compute(x_BT):
    return turns.mean(x_BT, MASK_BT, TURN_BT, turns=2).sum()

  np.testing.assert_array_equal(
    jax.grad(compute)(x_BT), [[0, 0, 0.5, 0, 0.5, 0, 1, 0]]
  )


def test_totals_are_float32_from_bfloat16_and_bool():
  # Bfloat16 cannot count past 256.
  mask_BT = jnp.ones((1, 300), bool)
  for x_BT in (jnp.ones((1, 300), jnp.bfloat16), mask_BT):
    sum_BK, count_BK = turns.total(
      x_BT, mask_BT, jnp.zeros((1, 300), jnp.int32), turns=2
    )
    assert sum_BK.dtype == count_BK.dtype == jnp.float32
    np.testing.assert_array_equal(sum_BK, [[300, 0]])
    np.testing.assert_array_equal(count_BK, [[300, 0]])


def test_pick_keeps_every_bit_of_an_integer():
  # float32 has no 2**24 + 1.
  ids_BT = jnp.array([[2**24 + 1, 5, -(2**31)]], jnp.int32)
  first_BT = jnp.array([[True, False, True]])
  turn_BT = jnp.array([[0, 0, 1]])
  picked_BK = turns.pick(ids_BT, first_BT, turn_BT, turns=3)
  assert picked_BK.dtype == jnp.int32
  np.testing.assert_array_equal(picked_BK, [[2**24 + 1, -(2**31), 0]])
