"""Signals from logits by hand and by loop, and the dict of the train step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.algorithm import signals


@pytest.fixture(name='logits_BTV')
def _logits_BTV():
  rng = np.random.default_rng(0)
  return jnp.array(rng.normal(scale=3.0, size=(2, 5, 7)), jnp.float32)


def loop(logits_BTV):
  """Energy, centered energy and entropy of each position, float64."""
  out_NBT = np.zeros((3, *logits_BTV.shape[:2]))
  for row, logits_TV in enumerate(np.asarray(logits_BTV, np.float64)):
    for t, logits_V in enumerate(logits_TV):
      total = np.exp(logits_V).sum()
      mean = logits_V.mean()
      prob_V = np.exp(logits_V) / total
      out_NBT[0, row, t] = -np.log(total)
      out_NBT[1, row, t] = -np.log(np.exp(logits_V - mean).sum())
      out_NBT[2, row, t] = -(prob_V * np.log(prob_V)).sum()
  return out_NBT


def test_by_hand():
  # Probabilities 1/4 and 3/4 with normaliser 4; then a uniform pair.
  logits_BTV = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0]]]))
  np.testing.assert_allclose(
    signals.energy(logits_BTV), [[-np.log(4), -np.log(2)]], rtol=1e-6
  )
  np.testing.assert_allclose(
    signals.entropy(logits_BTV),
    [[np.log(4) - 0.75 * np.log(3), np.log(2)]],
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    signals.centered_energy(logits_BTV),
    [[-np.log(4 / np.sqrt(3)), -np.log(2)]],
    rtol=1e-6,
  )


def test_against_a_loop(logits_BTV):
  energy_BT, centered_BT, entropy_BT = loop(logits_BTV)
  np.testing.assert_allclose(signals.energy(logits_BTV), energy_BT, rtol=1e-5)
  np.testing.assert_allclose(
    signals.centered_energy(logits_BTV), centered_BT, rtol=1e-5
  )
  np.testing.assert_allclose(signals.entropy(logits_BTV), entropy_BT, rtol=1e-4)


def test_only_the_energy_moves_with_a_constant(logits_BTV):
  shift_BT1 = jnp.linspace(-40.0, 40.0, 10).reshape(2, 5, 1)
  moved_BTV = logits_BTV + shift_BT1
  np.testing.assert_allclose(
    signals.energy(moved_BTV),
    signals.energy(logits_BTV) - shift_BT1[..., 0],
    rtol=1e-5,
  )
  for signal in (signals.centered_energy, signals.entropy):
    np.testing.assert_allclose(
      signal(moved_BTV), signal(logits_BTV), atol=2e-5, rtol=0
    )


def test_bfloat16_logits_are_reduced_in_float32():
  # In bfloat16 log(1000) = 6.9078 would be 6.90625 at best.
  logits_BTV = jnp.zeros((1, 1, 1000), jnp.bfloat16)
  for signal, want in (
    (signals.energy, -np.log(1000)),
    (signals.centered_energy, -np.log(1000)),
    (signals.entropy, np.log(1000)),
  ):
    got_BT = signal(logits_BTV)
    assert got_BT.dtype == jnp.float32
    np.testing.assert_allclose(got_BT, [[want]], rtol=1e-5)


def test_impossible_tokens_add_no_entropy():
  logits_BTV = jnp.array([[[0.0, 0.0, -jnp.inf]]])
  np.testing.assert_allclose(
    signals.entropy(logits_BTV), [[np.log(2)]], rtol=1e-6
  )


def test_the_train_step_forms_agree_with_the_definitions(logits_BTV):
  old_BT = jnp.array([[-1.0, -2.0], [-3.0, -0.5]])
  ref_BT = jnp.array([[-1.5, -1.0], [-3.0, -4.5]])
  scores = {
    'ref_logsumexp_BT': jax.nn.logsumexp(logits_BTV, axis=-1),
    'ref_mean_logit_BT': jnp.mean(logits_BTV, axis=-1),
    'ref_entropy_BT': signals.entropy(logits_BTV),
    'ref_logprob_BT': ref_BT,
    'old_logprob_BT': old_BT,
    'key': jax.random.key(0),
  }
  got = {name: signal(**scores) for name, signal in signals.SIGNALS.items()}
  controls = {'entropy', 'nll', 'logprob_shift', 'random', 'centered_energy'}
  assert set(got) == {'energy', *controls}
  np.testing.assert_array_equal(got['energy'], signals.energy(logits_BTV))
  np.testing.assert_array_equal(got['entropy'], signals.entropy(logits_BTV))
  _, centered_BT, _ = loop(logits_BTV)
  np.testing.assert_allclose(got['centered_energy'], centered_BT, rtol=1e-5)
  np.testing.assert_array_equal(got['nll'], [[1.0, 2.0], [3.0, 0.5]])
  np.testing.assert_array_equal(got['logprob_shift'], [[0.5, -1.0], [0.0, 4.0]])
  assert got['random'].shape == (2, 2)


def test_random_is_standard_normal_and_names_its_tokens():
  def draw(seed, shape):
    key = jax.random.key(seed)
    return np.asarray(signals.random(old_logprob_BT=jnp.zeros(shape), key=key))

  noise_BT = draw(0, (16, 512))
  assert abs(noise_BT.mean()) < 0.05
  assert abs(noise_BT.std() - 1) < 0.05
  assert len(np.unique(noise_BT)) > 0.99 * noise_BT.size
  np.testing.assert_array_equal(noise_BT, draw(0, (16, 512)))
  np.testing.assert_array_equal(noise_BT[:3, :200], draw(0, (3, 200)))
  assert not np.array_equal(noise_BT, draw(1, (16, 512)))
