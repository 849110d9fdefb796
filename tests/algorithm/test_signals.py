"""Signals: the energy from logits, and each signal from scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import signals


@pytest.fixture(name='logits_BTV')
def _logits_BTV():
  rng = np.random.default_rng(0)
  return jnp.array(rng.normal(scale=3.0, size=(2, 5, 7)), jnp.float32)


def inputs_of(logits_BTV, old_BT=None, ref_BT=None, seed=0):
  """Scores as the train step has them; [B, T] numbers may be left out."""
  zero_BT = jnp.zeros(logits_BTV.shape[:2])
  prob_BTV = jax.nn.softmax(logits_BTV)
  return signals.SignalInputs(
    ref_logsumexp_BT=jax.nn.logsumexp(logits_BTV, axis=-1),
    ref_mean_logit_BT=jnp.mean(logits_BTV, axis=-1),
    ref_entropy_BT=-jnp.sum(prob_BTV * jnp.log(prob_BTV), axis=-1),
    ref_logprob_BT=zero_BT if ref_BT is None else ref_BT,
    old_logprob_BT=zero_BT if old_BT is None else old_BT,
    key=jax.random.key(seed),
  )


def test_energy_by_hand_and_against_a_loop(logits_BTV):
  by_hand_BTV = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0]]]))
  np.testing.assert_allclose(
    signals.energy(by_hand_BTV), [[-np.log(4), -np.log(2)]], rtol=1e-6
  )
  want_BT = [
    [-np.log(np.exp(logits_V).sum()) for logits_V in logits_TV]
    for logits_TV in np.asarray(logits_BTV, np.float64)
  ]
  np.testing.assert_allclose(signals.energy(logits_BTV), want_BT, rtol=1e-5)


def test_energy_of_bfloat16_logits_is_reduced_in_float32():
  # In bfloat16 log(1000) = 6.9078 would be 6.90625 at best.
  got_BT = signals.energy(jnp.zeros((1, 1, 1000), jnp.bfloat16))
  assert got_BT.dtype == jnp.float32
  np.testing.assert_allclose(got_BT, [[-np.log(1000)]], rtol=1e-5)


def test_energy_moves_with_a_constant_and_centered_energy_does_not(logits_BTV):
  shift_BT1 = jnp.linspace(-40.0, 40.0, 10).reshape(2, 5, 1)
  moved_BTV = logits_BTV + shift_BT1
  np.testing.assert_allclose(
    signals.energy(moved_BTV),
    signals.energy(logits_BTV) - shift_BT1[..., 0],
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    signals.centered_energy(inputs_of(moved_BTV)),
    signals.centered_energy(inputs_of(logits_BTV)),
    atol=2e-5,
    rtol=0,
  )


def test_signals_of_the_train_step_by_definition(logits_BTV):
  old_BT = jnp.linspace(-4.0, -1.0, 10).reshape(2, 5)
  ref_BT = jnp.linspace(-2.0, -3.0, 10).reshape(2, 5)
  inputs = inputs_of(logits_BTV, old_BT, ref_BT)
  got = {name: signal(inputs) for name, signal in signals.SIGNALS.items()}
  assert set(signals.WITHOUT_REFERENCE) == {'nll', 'random'} < set(got)
  centered_BTV = logits_BTV - logits_BTV.mean(axis=-1, keepdims=True)
  want = {
    'energy': signals.energy(logits_BTV),
    'entropy': inputs.ref_entropy_BT,
    'nll': -old_BT,
    'logprob_shift': old_BT - ref_BT,
    'centered_energy': signals.energy(centered_BTV),
  }
  assert got.keys() == {*want, 'random'}
  for name, want_BT in want.items():
    np.testing.assert_allclose(got[name], want_BT, rtol=1e-5, err_msg=name)


def test_random_is_standard_normal_and_named_by_its_token():
  def draw(seed, rows, tokens):
    inputs = inputs_of(jnp.zeros((rows, tokens, 1)), seed=seed)
    return np.asarray(signals.random(inputs))

  noise_BT = draw(0, 16, 512)
  assert abs(noise_BT.mean()) < 0.05
  assert abs(noise_BT.std() - 1) < 0.05
  assert len(np.unique(noise_BT)) > 0.99 * noise_BT.size
  np.testing.assert_array_equal(noise_BT, draw(0, 16, 512))
  np.testing.assert_array_equal(noise_BT[:3, :200], draw(0, 3, 200))
  assert not np.array_equal(noise_BT, draw(1, 16, 512))
