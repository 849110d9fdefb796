"""Signals of the token weights: the energy of the paper, and alternatives.

A signal is one number per token, in nats except for the random control. The
energy comes from the frozen reference model; the ablation and the controls put
another number in its place and leave the rest of the pipeline alone. No
temperature enters any of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SignalInputs(NamedTuple):
  """Scores that a signal is computed from, [B, T] float32, aligned per token.

  Attributes:
    ref_logsumexp_BT: logsumexp of the reference's raw logits, nats.
    ref_mean_logit_BT: mean of the reference's raw logits over the vocabulary.
    ref_entropy_BT: entropy of the reference's prediction, nats.
    ref_logprob_BT: log-probability under the reference, nats.
    old_logprob_BT: log-probability under the rollout policy, nats.
    key: PRNG key, one per training step.
  """

  ref_logsumexp_BT: jax.Array
  ref_mean_logit_BT: jax.Array
  ref_entropy_BT: jax.Array
  ref_logprob_BT: jax.Array
  old_logprob_BT: jax.Array
  key: jax.Array


def energy(logits_BTV: jax.Array) -> jax.Array:
  """Token energy `E_t = -logsumexp_v f[t, v]`, nats; source: arXiv 2605.14558.

  f are the raw logits of the frozen reference; [:, t] predicts token t.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  return energy_of_logsumexp(jax.nn.logsumexp(logits_BTV, axis=-1))


def energy_of_logsumexp(logsumexp_BT: jax.Array) -> jax.Array:
  """Token energy where scoring has reduced the logits already."""
  return -logsumexp_BT


def reference_energy(inputs: SignalInputs) -> jax.Array:
  """Token energy of the frozen reference."""
  return energy_of_logsumexp(inputs.ref_logsumexp_BT)


def reference_entropy(inputs: SignalInputs) -> jax.Array:
  """Entropy of the reference's prediction: `-sum_v p[t, v] log p[t, v]`."""
  return inputs.ref_entropy_BT


def nll(inputs: SignalInputs) -> jax.Array:
  """Surprise of the rollout policy at its own token: `-log pi_old(y_t)`."""
  return -inputs.old_logprob_BT


def logprob_shift(inputs: SignalInputs) -> jax.Array:
  """Drift from the reference: `log pi_old(y_t) - log pi_ref(y_t)`."""
  return inputs.old_logprob_BT - inputs.ref_logprob_BT


def random(inputs: SignalInputs) -> jax.Array:
  """Control: random weights with the same spread, N(0, 1) per token.

  Each draw is named by its row and position, so it does not depend on the
  length to which the batch is padded.
  """
  num_rows, num_tokens = inputs.old_logprob_BT.shape
  fold = jax.random.fold_in
  key_B = jax.vmap(fold, (None, 0))(inputs.key, jnp.arange(num_rows))
  fold_tokens = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))
  key_BT = fold_tokens(key_B, jnp.arange(num_tokens))
  return jax.vmap(jax.vmap(jax.random.normal))(key_BT)


def centered_energy(inputs: SignalInputs) -> jax.Array:
  """Energy of mean-free logits: `-logsumexp_v(f[t, v] - mean_v f[t, v])`.

  A constant added to all logits of one position changes no probability, yet
  shifts the energy. This control does not move with it.
  """
  # logsumexp(f - c) = logsumexp(f) - c.
  return reference_energy(inputs) + inputs.ref_mean_logit_BT


# weights.signal -> (SignalInputs) -> signal_BT.
SIGNALS = {
  'energy': reference_energy,
  'entropy': reference_entropy,
  'nll': nll,
  'logprob_shift': logprob_shift,
  'random': random,
  'centered_energy': centered_energy,
}
# Signals that are computed without the reference model.
WITHOUT_REFERENCE = ('nll', 'random')
