"""The update: gradients of mini-batches, and one optimizer step for each.

The life of one mini-batch:

1. Its rows go through policy and critic a micro-batch at a time; the gradients
   are added up. Denominators are those of the whole mini-batch.
2. One step of the policy's optimizer, and one of the critic's.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from actfocus_jax.algorithm import losses, trajectory
from actfocus_jax.learner import microbatch as microbatch_lib
from actfocus_jax.learner.prepare import Metrics, Recipe, UpdateBatch
from actfocus_jax.learner.state import ModelState
from actfocus_jax.model import scoring

Gradient = Callable[[Any, UpdateBatch], tuple[Any, Metrics]]


def epochs(
  actor: ModelState,
  critic: ModelState | None,
  ready: UpdateBatch,
  key: jax.Array,
  recipe: Recipe,
  *,
  actor_step: Callable[..., tuple[ModelState, Metrics]],
  critic_step: Callable[..., tuple[ModelState, Metrics]] | None,
) -> tuple[ModelState, ModelState | None, Metrics]:
  """Every mini-batch of every epoch, for the policy and then for the critic.

  Neither reads the other, so the order changes no number.

  Args:
    actor: The policy, before.
    critic: The critic, before; None without one.
    ready: From `stages.weigh`.
    key: Orders the rows, where there is more than one mini-batch.
    recipe: Of the run.
    actor_step: (trained, minibatch) -> (trained, metrics).
    critic_step: The same for the critic; None without one.

  Returns:
    Policy and critic after, and the metrics averaged over optimizer steps;
    those whose name ends in `_max` are the largest of them.
  """
  parts = _minibatches(ready, key, recipe)
  # A loop for each: in one loop, the gradients of both are alive together.
  actor, metrics = jax.lax.scan(actor_step, actor, parts)
  if critic_step is not None:
    critic, more = jax.lax.scan(critic_step, critic, parts)
    metrics |= more
  reduced = {
    name: x.max() if name.endswith('_max') else x.mean()
    for name, x in metrics.items()
  }
  return actor, critic, reduced


def step(
  trained: ModelState,
  minibatch: UpdateBatch,
  *,
  tx: optax.GradientTransformation,
  gradient: Gradient,
  name: str,
  is_update: jax.Array | bool = True,
) -> tuple[ModelState, Metrics]:
  """One optimizer step.

  Args:
    trained: Before.
    minibatch: Its rows.
    tx: The optimizer.
    gradient: (params, minibatch) -> (gradient, metrics).
    name: 'actor' or 'critic', of the metrics.
    is_update: Whether parameters and moments change at all.

  Returns:
    After, and the metrics.
  """
  grads, metrics = gradient(trained.params, minibatch)
  # `top_p` can leave a mini-batch without a token; momentum and decay would
  # move the parameters all the same.
  is_update &= minibatch.sampled_BT.any()
  updates, new_opt_state = tx.update(grads, trained.opt_state, trained.params)
  # Here and not around the loop: a choice between whole states after it would
  # keep the old one alive beside the new one.
  updates = jax.tree.map(lambda x: jnp.where(is_update, x, 0), updates)
  opt_state = jax.tree.map(
    functools.partial(jnp.where, is_update), new_opt_state, trained.opt_state
  )
  metrics[f'{name}/grad_norm'] = optax.tree.norm(grads)
  metrics[f'{name}/update_norm'] = optax.tree.norm(updates)
  params = optax.apply_updates(trained.params, updates)
  return ModelState(params, opt_state), metrics


# --- Gradients ---------------------------------------------------------------


def actor_gradient(
  graphdef, params, minibatch: UpdateBatch, recipe: Recipe
) -> tuple[Any, Metrics]:
  """Gradient of the policy's objective over one mini-batch.

      L = policy loss - c_entropy * mean_t H_t + c_kl * mean_t KL_t

  with the policy loss a weighted mean over tokens. Denominators are sums over
  the whole mini-batch. They do not depend on the parameters, so the
  micro-batches' gradients only have to be added up. Source: arXiv 2605.14558,
  the weighted clipped objective.

  Args:
    graphdef: Of the policy.
    params: Of the policy.
    minibatch: Rows of one optimizer step.
    recipe: Of the run.

  Returns:
    The gradient, shaped like `params`, and the metrics of the mini-batch.
  """
  policy_count = losses.denominator(
    minibatch.weight_BT, reduction=recipe.reduction
  )
  sampled_count = minibatch.sampled_BT.sum(dtype=jnp.float32)

  def loss_fn(params, part: UpdateBatch):
    scores = scoring.score_tokens(
      graphdef,
      params,
      part.tokens_BT,
      part.valid_BT,
      temperature=recipe.temperature,
      chunk=recipe.score_chunk,
    )
    ratio_of = recipe.ratio_of or _own
    (policy_sum, _), metrics = recipe.policy_loss(
      ratio_of(scores.logprob_BT, part.sampled_BT, part.turn_BT),
      ratio_of(part.old_logprob_BT, part.sampled_BT, part.turn_BT),
      part.advantage_BT,
      part.weight_BT,
      importance_BT=part.importance_BT,
      sampled_BT=part.sampled_BT,
    )
    entropy_sum, _ = losses.entropy_bonus(scores.entropy_BT, part.sampled_BT)
    policy = trajectory.divide(policy_sum, policy_count)
    entropy = trajectory.divide(entropy_sum, sampled_count)
    terms = {'policy_loss': policy, 'entropy': entropy}
    loss = policy - recipe.entropy_coefficient * entropy
    if recipe.kl_coefficient:
      kl_sum, _ = losses.kl(
        scores.raw_logprob_BT,
        part.ref_logprob_BT,
        part.sampled_BT,
        estimator=recipe.kl_estimator,
      )
      terms['kl'] = trajectory.divide(kl_sum, sampled_count)
      loss = loss + recipe.kl_coefficient * terms['kl']
    return loss, (terms | {'loss': loss}, metrics)

  grads, (terms, metrics) = _summed(loss_fn, params, minibatch, recipe)
  return grads, _named('actor', terms, metrics, sampled_count)


def critic_gradient(
  graphdef, params, minibatch: UpdateBatch, recipe: Recipe
) -> tuple[Any, Metrics]:
  """Gradient of the critic's objective over one mini-batch.

  The clipped squared error, a plain mean over the tokens of `critic_BT`.

  Args:
    graphdef: Of the critic.
    params: Of the critic.
    minibatch: Rows of one optimizer step.
    recipe: Of the run.

  Returns:
    The gradient, shaped like `params`, and the metrics of the mini-batch.
  """
  count = minibatch.critic_BT.sum(dtype=jnp.float32)

  def loss_fn(params, part: UpdateBatch):
    value_BT = scoring.value_tokens(
      graphdef, params, part.tokens_BT, part.valid_BT
    )
    (total, _), metrics = recipe.value_loss(
      value_BT, part.old_value_BT, part.return_BT, part.critic_BT
    )
    loss = trajectory.divide(total, count)
    return loss, ({'loss': loss}, metrics)

  grads, (terms, metrics) = _summed(loss_fn, params, minibatch, recipe)
  return grads, _named('critic', terms, metrics, count)


def _own(logprob_BT, sampled_BT, turn_BT):
  """Every token's ratio is its own."""
  del sampled_BT, turn_BT
  return logprob_BT


def _summed(loss_fn, params, minibatch: UpdateBatch, recipe: Recipe):
  """Adds up the gradients of the micro-batches, and stacks what they say."""

  def add(total, part):
    grads, aux = jax.grad(loss_fn, has_aux=True)(params, part)
    return jax.tree.map(jnp.add, total, grads), aux

  zeros = jax.tree.map(jnp.zeros_like, params)
  return jax.lax.scan(
    add, zeros, microbatch_lib.micro(minibatch, recipe.microbatch)
  )


def _named(name, terms, metrics, count) -> Metrics:
  """Sums over the micro-batches, as the metrics of a mini-batch."""
  named = {f'{name}/{term}': x.sum() for term, x in terms.items()}
  for metric, x in metrics.items():
    if isinstance(x, tuple):  # A pair; its own count is that of one part.
      named[f'{name}/{metric}'] = trajectory.divide(x[0].sum(), count)
    else:
      named[f'{name}/{metric}'] = x.max()
  return named


# --- Mini-batches ------------------------------------------------------------


def _minibatches(ready: UpdateBatch, key, recipe: Recipe) -> UpdateBatch:
  """[epochs * minibatches, minibatch, T], rows in an order named by `key`."""
  count = ready.tokens_BT.shape[0]
  if count == recipe.minibatch and recipe.epochs == 1:
    return microbatch_lib.consecutive(ready, count)

  def epoch(index):
    order = jax.random.permutation(jax.random.fold_in(key, index), count)
    shuffled = jax.tree.map(lambda x: x[order], ready)
    return microbatch_lib.consecutive(shuffled, recipe.minibatch)

  parts = [epoch(index) for index in range(recipe.epochs)]
  return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
