"""Signals: each from the scores of logits, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import signals


@pytest.fixture(name='logits_BTV')
def _logits_BTV():
  rng = np.random.default_rng(0)
  return jnp.array(rng.normal(scale=3.0, size=(2, 5, 7)), jnp.float32)


def inputs_of(logits_BTV, seed=0):
  """Scores as the train step has them."""
  B, T, _ = logits_BTV.shape
  prob_BTV = jax.nn.softmax(logits_BTV)
  return signals.SignalInputs(
    ref_logsumexp_BT=jax.nn.logsumexp(logits_BTV, axis=-1),
    ref_mean_logit_BT=jnp.mean(logits_BTV, axis=-1),
    ref_entropy_BT=-jnp.sum(prob_BTV * jnp.log(prob_BTV), axis=-1),
    ref_logprob_BT=jnp.linspace(-2.0, -3.0, B * T).reshape(B, T),
    old_logprob_BT=jnp.linspace(-4.0, -1.0, B * T).reshape(B, T),
    key=jax.random.key(seed),
  )


def test_signals_against_loops(logits_BTV):
  inputs = inputs_of(logits_BTV)
  want = {name: np.zeros((2, 5)) for name in ('energy', 'centered_energy')}
  for at in np.ndindex(2, 5):
    logits_V = np.asarray(logits_BTV, np.float64)[at]
    want['energy'][at] = -np.log(np.exp(logits_V).sum())
    centered_V = logits_V - logits_V.mean()
    want['centered_energy'][at] = -np.log(np.exp(centered_V).sum())
  want['entropy'] = inputs.ref_entropy_BT
  want['nll'] = -inputs.old_logprob_BT
  want['logprob_shift'] = inputs.old_logprob_BT - inputs.ref_logprob_BT
  assert signals.SIGNALS.keys() == {*want, 'random'}
  assert set(signals.WITHOUT_REFERENCE) == {'nll', 'random'}
  for name, want_BT in want.items():
    got_BT = signals.SIGNALS[name](inputs)
    np.testing.assert_allclose(got_BT, want_BT, rtol=1e-5, err_msg=name)
  np.testing.assert_array_equal(
    signals.energy(logits_BTV), signals.SIGNALS['energy'](inputs)
  )


def test_energy_moves_with_a_constant_and_centered_energy_does_not(logits_BTV):
  shift_BT1 = jnp.linspace(-40.0, 40.0, 10).reshape(2, 5, 1)
  inputs, moved = inputs_of(logits_BTV), inputs_of(logits_BTV + shift_BT1)
  np.testing.assert_allclose(
    signals.reference_energy(moved),
    signals.reference_energy(inputs) - shift_BT1[..., 0],
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    signals.centered_energy(moved),
    signals.centered_energy(inputs),
    atol=2e-5,
    rtol=0,
  )


def test_random_is_standard_normal_and_named_by_its_token():
  def draw(seed, rows, tokens):
    inputs = inputs_of(jnp.zeros((rows, tokens, 1)), seed)
    return np.asarray(signals.random(inputs))

  noise_BT = draw(0, 16, 512)
  assert abs(noise_BT.mean()) < 0.05
  assert abs(noise_BT.std() - 1) < 0.05
  assert len(np.unique(noise_BT)) > 0.99 * noise_BT.size
  np.testing.assert_array_equal(noise_BT, draw(0, 16, 512))
  np.testing.assert_array_equal(noise_BT[:3, :200], draw(0, 3, 200))
  assert not np.array_equal(noise_BT, draw(1, 16, 512))
