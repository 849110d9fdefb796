"""Supervised learning on demonstrations: the warm start's train step."""

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
  """One optimizer step on the mean negative log-prob of the response tokens.

  A model that starts from nothing learns to copy from what it reads much sooner
  when it also predicts what it reads, which repeats itself from turn to turn.

  Args:
    graphdef: Of the model.
    tx: The optimizer.
    state: Before.
    tokens_BT: Ids of whole conversations.
    valid_BT: Not padding.
    sampled_BT: Written by the player, the stop id included.
    observation_weight: Of the mean over all other tokens, added to the loss.

  Returns:
    The state after, and `loss` of the response tokens in nats per token.
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
  """Mean negative log-prob of the tokens of a mask."""
  count = jnp.maximum(mask_BT.sum(dtype=jnp.float32), 1.0)
  return -jnp.where(mask_BT, logprob_BT, 0.0).sum() / count
