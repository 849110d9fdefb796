"""What a token is weighted by: the energy of the paper, and its rivals.

A signal is one number per token, in nats except for the random control. The
energy comes from the frozen reference model; the ablation and the controls put
another number in its place and leave the rest of the pipeline alone. No
temperature enters any of them.

The first half of the file defines the signals. `SIGNALS` gives them to the
train step, which never holds logits, only the scores made from them.
"""

import chex
import jax
import jax.numpy as jnp


def energy(logits_BTV: jax.Array) -> jax.Array:
  """Token energy: `E_t = -logsumexp_v f[t, v]`.

  Source: arXiv 2605.14558, the token energy.

  Args:
    logits_BTV: raw logits of the frozen reference, any floating type;
      `[:, t]` are those that predict token t.

  Returns:
    energy_BT, float32, nats.

  Raises:
    AssertionError: the logits do not have three axes.
  """
  chex.assert_rank(logits_BTV, 3)
  return -jax.nn.logsumexp(logits_BTV.astype(jnp.float32), axis=-1)


def centered_energy(logits_BTV: jax.Array) -> jax.Array:
  """Energy of mean-free logits: `-logsumexp_v(f[t, v] - mean_v f[t, v])`.

  A constant added to all logits of one position changes no probability, yet
  shifts the energy. This control does not move with it.

  Args:
    logits_BTV: raw, finite logits of the frozen reference; `[:, t]` are those
      that predict token t.

  Returns:
    centered_energy_BT, float32, nats; at most -log V.

  Raises:
    AssertionError: the logits do not have three axes.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  return energy(logits_BTV - jnp.mean(logits_BTV, axis=-1, keepdims=True))


def entropy(logits_BTV: jax.Array) -> jax.Array:
  """Entropy of the prediction: `H_t = -sum_v p[t, v] log p[t, v]`.

  Args:
    logits_BTV: raw logits of the frozen reference, -inf allowed; `[:, t]` are
      those that predict token t.

  Returns:
    entropy_BT, float32, nats, from 0 to log V.

  Raises:
    AssertionError: the logits do not have three axes.
  """
  chex.assert_rank(logits_BTV, 3)
  logprob_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
  prob_BTV = jnp.exp(logprob_BTV)
  # The limit of p log p is 0; computed, 0 * -inf is NaN.
  return -jnp.sum(jnp.where(prob_BTV > 0, prob_BTV * logprob_BTV, 0.0), axis=-1)


def nll(old_logprob_BT: jax.Array) -> jax.Array:
  """Surprise of the rollout policy at its own token: `-log pi_old(y_t)`."""
  return -old_logprob_BT


def logprob_shift(
  old_logprob_BT: jax.Array, ref_logprob_BT: jax.Array
) -> jax.Array:
  """Drift from the reference: `log pi_old(y_t) - log pi_ref(y_t)`, nats."""
  chex.assert_equal_shape([old_logprob_BT, ref_logprob_BT])
  return old_logprob_BT - ref_logprob_BT


def random(
  *, old_logprob_BT: jax.Array, key: jax.Array, **_: jax.Array
) -> jax.Array:
  """Control: N(0, 1) per token. Does any spread of weights do?

  Each draw is named by its row and position, so that the length to which the
  batch happens to be padded does not change it.

  Args:
    old_logprob_BT: read for its shape only.
    key: PRNG key, one per training step.

  Returns:
    signal_BT, float32, without unit.
  """
  num_rows, num_tokens = old_logprob_BT.shape
  fold = jax.random.fold_in
  key_B = jax.vmap(fold, (None, 0))(key, jnp.arange(num_rows))
  fold_tokens = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))
  key_BT = fold_tokens(key_B, jnp.arange(num_tokens))
  return jax.vmap(jax.vmap(jax.random.normal))(key_BT)


# Each takes, by keyword, ref_logsumexp_BT, ref_mean_logit_BT, ref_entropy_BT,
# ref_logprob_BT, old_logprob_BT (aligned per token, nats) and key, uses what it
# needs, and returns signal_BT.
SIGNALS = {
  'energy': lambda *, ref_logsumexp_BT, **_: -ref_logsumexp_BT,
  # logsumexp(f - c) = logsumexp(f) - c.
  'centered_energy': lambda *, ref_logsumexp_BT, ref_mean_logit_BT, **_: (
    ref_mean_logit_BT - ref_logsumexp_BT
  ),
  'entropy': lambda *, ref_entropy_BT, **_: ref_entropy_BT,
  'nll': lambda *, old_logprob_BT, **_: nll(old_logprob_BT),
  'logprob_shift': lambda *, old_logprob_BT, ref_logprob_BT, **_: logprob_shift(
    old_logprob_BT, ref_logprob_BT
  ),
  'random': random,
}
