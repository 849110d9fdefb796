"""Supervised learning on demonstrations: the warm start's train step."""

import functools

import jax
import jax.numpy as jnp
import optax

from actfocus_jax.learner import state as state_lib
from actfocus_jax.model import scoring


@functools.partial(
  jax.jit, static_argnames=('graphdef', 'tx'), donate_argnames='state'
)
def step(
  graphdef,
  tx: optax.GradientTransformation,
  state: state_lib.Trained,
  tokens_BT: jax.Array,
  valid_BT: jax.Array,
  sampled_BT: jax.Array,
) -> tuple[state_lib.Trained, dict[str, jax.Array]]:
  """One optimizer step on the mean negative log-prob of the response tokens.

  Args:
    graphdef: Of the model.
    tx: The optimizer.
    state: Before.
    tokens_BT: Ids of whole conversations.
    valid_BT: Not padding.
    sampled_BT: Written by the player, the stop id included.

  Returns:
    The state after, and `loss` in nats per token.
  """

  def loss_fn(params):
    scores = scoring.score_tokens(graphdef, params, tokens_BT, valid_BT)
    count = jnp.maximum(sampled_BT.sum(dtype=jnp.float32), 1.0)
    return -jnp.where(sampled_BT, scores.logprob_BT, 0.0).sum() / count

  loss, grads = jax.value_and_grad(loss_fn)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return state_lib.Trained(params, opt_state), {'loss': loss}
