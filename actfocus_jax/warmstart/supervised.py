"""Supervised train step of the warm start."""

import functools

import jax
import jax.numpy as jnp
import optax

from actfocus_jax.learner import state as state_lib
from actfocus_jax.model import scoring


@functools.partial(
  jax.jit,
  static_argnames=('graphdef', 'tx', 'observation_weight'),
  donate_argnames='state',
)
def step(
  graphdef,
  tx: optax.GradientTransformation,
  state: state_lib.ModelState,
  tokens_BT: jax.Array,
  valid_BT: jax.Array,
  sampled_BT: jax.Array,
  *,
  observation_weight: float = 0.0,
) -> tuple[state_lib.ModelState, dict[str, jax.Array]]:
  """Take one optimizer step on the mean negative log-prob of responses.

  A model from random weights learns to copy from the observations much sooner
  if it also predicts them, because they repeat from turn to turn.

  Args:
    graphdef: graph definition of the model.
    tx: optimizer.
    state: state before the step; donated.
    tokens_BT: ids of whole conversations.
    valid_BT: True except on padding.
    sampled_BT: True on tokens that the player wrote, stop ids included.
    observation_weight: weight of the mean over all other tokens in the loss.

  Returns:
    The state after the step, and `loss` of the response tokens in nats per
    token.
  """

  def loss_fn(params):
    scores = scoring.score_tokens(graphdef, params, tokens_BT, valid_BT)
    loss = _mean(scores.logprob_BT, sampled_BT)
    if not observation_weight:
      return loss, loss
    observed_BT = (valid_BT & ~sampled_BT).at[:, 0].set(False)
    observed = _mean(scores.logprob_BT, observed_BT)
    return loss + observation_weight * observed, loss

  (_, loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return state_lib.ModelState(params, opt_state), {'loss': loss}


def _mean(logprob_BT, mask_BT) -> jax.Array:
  """Mean negative log-prob over a mask, in nats per token."""
  count = jnp.maximum(mask_BT.sum(dtype=jnp.float32), 1.0)
  return -jnp.where(mask_BT, logprob_BT, 0.0).sum() / count
