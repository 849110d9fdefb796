"""The train step: one pure function, from a batch of episodes to an update.

The life of one batch:

1. `select`: the groups whose members fared differently are gathered.
2. `score`: policy and frozen reference read every token once.
3. `weigh`: the reference's signal becomes the weights of equation (w_t), the
   returns become group-relative advantages.
4. `update`: for each mini-batch the gradients of its micro-batches are added
   up and one optimizer step is made.

`TrainStep` compiles 1 to 4 as one program, or 1 to 3 and 4 as two that can be
timed apart. Which of the two changes nothing else.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from actfocus_jax.algorithm import (
  advantages,
  losses,
  selection,
  trajectory,
  weights,
)
from actfocus_jax.learner.state import TrainState
from actfocus_jax.model import scoring

Trajectory = trajectory.Trajectory
Metrics = dict[str, jax.Array]
_ROWS = ('data', 'fsdp')


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What is chosen once per run: numbers, and functions by the stage.

  Attributes:
    members: G, the size of a group.
    ratio: Share of the groups that is kept.
    signal: (scores as keywords, key) -> signal_BT; one of signals.SIGNALS.
    token_weights: weights.token_weights with alpha and beta.
    advantage: return_PG -> advantage_PG.
    policy_loss: losses.policy_loss with its clips.
    entropy_coefficient: Of the entropy bonus.
    minibatch: Rows per optimizer step; divides the kept rows.
    microbatch: Rows per forward and backward pass; divides the mini-batch.
    epochs: Passes over the batch.
    temperature: At which the batch was sampled.
    rescore: Whether ratios are taken against a fresh forward pass instead of
      the sampler's own log-probs.
    score_chunk: Tokens whose logits exist at a time.
  """

  members: int
  ratio: float
  signal: Callable[..., jax.Array]
  token_weights: Callable[..., jax.Array]
  advantage: Callable[[jax.Array], jax.Array]
  policy_loss: Callable[..., Any]
  entropy_coefficient: float
  minibatch: int
  microbatch: int
  epochs: int = 1
  temperature: float = 1.0
  rescore: bool = True
  score_chunk: int = 512


@flax.struct.dataclass
class Ready:
  """Kept rows with everything that the update reads; all [B, T]."""

  tokens_BT: jax.Array
  valid_BT: jax.Array
  sampled_BT: jax.Array
  old_logprob_BT: jax.Array
  advantage_BT: jax.Array
  weight_BT: jax.Array


# --- 1. Which groups ---------------------------------------------------------


def select(
  batch: Trajectory, *, members: int, ratio: float
) -> tuple[Trajectory, jax.Array]:
  """Gathers the groups of the largest spread.

  Args:
    batch: Group-major rows, [P * G, T].
    members: G.
    ratio: Share of the groups kept.

  Returns:
    The kept rows, and their returns [kept, G].
  """
  return_PG = trajectory.episode_return(batch).reshape(-1, members)
  index_B = selection.kept_rows(return_PG, ratio=ratio)
  kept = trajectory.take_rows(batch, index_B)
  return kept, trajectory.episode_return(kept).reshape(-1, members)


# --- 2. What the models say --------------------------------------------------


def score(
  graphdef, params, batch: Trajectory, recipe: Recipe
) -> scoring.Scores:
  """Scores every token without a gradient, a micro-batch at a time."""

  def one(rows):
    tokens_BT, valid_BT = rows
    return scoring.score_tokens(
      graphdef,
      params,
      tokens_BT,
      valid_BT,
      temperature=recipe.temperature,
      chunk=recipe.score_chunk,
    )

  parts = _split((batch.tokens, batch.valid), recipe.microbatch)
  scores = jax.lax.map(one, parts)
  return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), scores)


# --- 3. Weights and advantages -----------------------------------------------


def token_weights(
  batch: Trajectory,
  old: scoring.Scores,
  reference: scoring.Scores,
  key: jax.Array,
  recipe: Recipe,
) -> tuple[jax.Array, jax.Array]:
  """The signal and the weight of every token, [B, T] each."""
  signal_BT = recipe.signal(
    ref_logsumexp_BT=reference.logsumexp_BT,
    ref_entropy_BT=reference.entropy_BT,
    ref_logprob_BT=reference.raw_logprob_BT,
    old_logprob_BT=old.raw_logprob_BT,
    key=key,
  )
  weight_BT = recipe.token_weights(signal_BT, batch.sampled, batch.action)
  return signal_BT, weight_BT


def weigh(
  batch: Trajectory,
  return_PG: jax.Array,
  old: scoring.Scores,
  reference: scoring.Scores,
  key: jax.Array,
  recipe: Recipe,
) -> tuple[Ready, Metrics]:
  """Turns scores into token weights and returns into advantages.

  Args:
    batch: The kept rows.
    return_PG: Their returns.
    old: Scores by the policy before the update.
    reference: Scores by the frozen reference.
    key: For the random control.
    recipe: Of the run.

  Returns:
    What the update reads, and the metrics of the method.
  """
  signal_BT, weight_BT = token_weights(batch, old, reference, key, recipe)
  advantage_B = recipe.advantage(return_PG).reshape(-1)
  advantage_BT = advantages.broadcast(advantage_B, batch.sampled)
  ready = Ready(
    tokens_BT=batch.tokens,
    valid_BT=batch.valid,
    sampled_BT=batch.sampled,
    old_logprob_BT=old.logprob_BT if recipe.rescore else batch.logprob,
    advantage_BT=advantage_BT,
    weight_BT=weight_BT,
  )
  return ready, _method_metrics(batch, return_PG, signal_BT, weight_BT, old)


def _method_metrics(batch, return_PG, signal_BT, weight_BT, old) -> Metrics:
  mean, std = weights.signal_stats(signal_BT, batch.action)
  gap_BT = jnp.abs(old.logprob_BT - batch.logprob)
  sampled_gap_BT = jnp.where(batch.sampled, gap_BT, jnp.nan)
  spread_P = selection.group_spread(return_PG)
  count = jnp.asarray(spread_P.size, jnp.int32)
  return {
    'weights/action_share': trajectory.masked_mean(batch.action, batch.sampled),
    'weights/action_mass': weights.action_mass(weight_BT, batch.action),
    'signal/mean': mean,
    'signal/std': std,
    'selection/kept': count,
    'selection/kept_with_spread': (spread_P > 0).sum(dtype=jnp.int32),
    'selection/spread': spread_P.mean(),
    'rollout/sampler_gap_mean': trajectory.masked_mean(gap_BT, batch.sampled),
    'rollout/sampler_gap_p99': jnp.nanquantile(sampled_gap_BT, 0.99),
    'rollout/sampler_gap_max': jnp.where(batch.sampled, gap_BT, 0.0).max(),
  }


# --- 4. The update -----------------------------------------------------------


def update(
  graphdef,
  tx: optax.GradientTransformation,
  state: TrainState,
  ready: Ready,
  key: jax.Array,
  recipe: Recipe,
  is_update: jax.Array | bool = True,
) -> tuple[TrainState, Metrics]:
  """One optimizer step for every mini-batch of every epoch.

  Args:
    graphdef: Of the policy.
    tx: The optimizer.
    state: Before; `step` and `skipped` are left alone.
    ready: From `weigh`.
    key: Orders the rows, where there is more than one mini-batch.
    recipe: Of the run.
    is_update: Whether parameters and moments change at all.

  Returns:
    The state after, and the metrics averaged over optimizer steps;
    `actor/ratio_max` is the largest of them.
  """

  def one(carry, minibatch):
    params, opt_state = carry
    grads, metrics = minibatch_gradient(graphdef, params, minibatch, recipe)
    updates, new_opt_state = tx.update(grads, opt_state, params)
    # Inside the loop: a choice between whole states after it would keep the
    # old one alive beside the new one.
    updates = jax.tree.map(lambda x: jnp.where(is_update, x, 0), updates)
    opt_state = jax.tree.map(
      functools.partial(jnp.where, is_update), new_opt_state, opt_state
    )
    metrics['actor/grad_norm'] = optax.tree.norm(grads)
    metrics['actor/update_norm'] = optax.tree.norm(updates)
    return (optax.apply_updates(params, updates), opt_state), metrics

  minibatches = _minibatches(ready, key, recipe)
  carry = (state.params, state.opt_state)
  (params, opt_state), metrics = jax.lax.scan(one, carry, minibatches)
  largest = metrics['actor/ratio_max'].max()
  metrics = jax.tree.map(jnp.mean, metrics) | {'actor/ratio_max': largest}
  return state.replace(params=params, opt_state=opt_state), metrics


def minibatch_gradient(
  graphdef, params, minibatch: Ready, recipe: Recipe
) -> tuple[Any, Metrics]:
  """Gradient of the objective over one mini-batch.

      L = sum_t w_t l_t / sum_t w_t - c_entropy * mean_t H_t

  Both denominators are sums over the whole mini-batch. They do not depend on
  the parameters, so the micro-batches' gradients only have to be added up.
  Source: arXiv 2605.14558, the weighted clipped objective.

  Args:
    graphdef: Of the policy.
    params: Of the policy.
    minibatch: Rows of one optimizer step.
    recipe: Of the run.

  Returns:
    The gradient, shaped like `params`, and the metrics of the mini-batch.
  """
  weight_sum = minibatch.weight_BT.sum()
  sampled_sum = minibatch.sampled_BT.sum(dtype=jnp.float32)

  def loss_fn(params, rows: Ready):
    scores = scoring.score_tokens(
      graphdef,
      params,
      rows.tokens_BT,
      rows.valid_BT,
      temperature=recipe.temperature,
      chunk=recipe.score_chunk,
    )
    (policy_sum, _), metrics = recipe.policy_loss(
      scores.logprob_BT,
      rows.old_logprob_BT,
      rows.advantage_BT,
      rows.weight_BT,
      sampled_BT=rows.sampled_BT,
    )
    entropy_sum, _ = losses.entropy_bonus(scores.entropy_BT, rows.sampled_BT)
    policy = trajectory.divide(policy_sum, weight_sum)
    entropy = trajectory.divide(entropy_sum, sampled_sum)
    loss = policy - recipe.entropy_coefficient * entropy
    sums = {name: pair[0] for name, pair in _pairs(metrics)}
    parts = {'loss': loss, 'policy_loss': policy, 'entropy': entropy}
    return loss, (parts, sums, metrics['ratio_max'])

  def add(total, rows):
    grads, aux = jax.grad(loss_fn, has_aux=True)(params, rows)
    return jax.tree.map(jnp.add, total, grads), aux

  zeros = jax.tree.map(jnp.zeros_like, params)
  parts = _split(minibatch, recipe.microbatch)
  grads, (parts, sums, ratio_max) = jax.lax.scan(add, zeros, parts)
  metrics = {f'actor/{name}': x.sum() for name, x in parts.items()}
  for name, x in sums.items():
    metrics[f'actor/{name}'] = trajectory.divide(x.sum(), sampled_sum)
  metrics['actor/ratio_max'] = ratio_max.max()
  return grads, metrics


def _pairs(metrics):
  return [(k, v) for k, v in metrics.items() if isinstance(v, tuple)]


def _minibatches(ready: Ready, key, recipe: Recipe) -> Ready:
  """[epochs * minibatches, minibatch, T], rows in an order named by `key`."""
  rows = ready.tokens_BT.shape[0]
  if rows == recipe.minibatch and recipe.epochs == 1:
    return _split(ready, rows)

  def epoch(index):
    order = jax.random.permutation(jax.random.fold_in(key, index), rows)
    shuffled = jax.tree.map(lambda x: x[order], ready)
    return _split(shuffled, recipe.minibatch)

  parts = [epoch(index) for index in range(recipe.epochs)]
  return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def _split(tree, rows: int):
  """[B, ...] -> [B / rows, rows, ...], each part spread over the devices."""

  def one(x):
    parts = x.reshape(-1, rows, *x.shape[1:])
    if jax.sharding.get_abstract_mesh().empty:
      return parts
    return jax.lax.with_sharding_constraint(parts, P(None, _ROWS))

  return jax.tree.map(one, tree)


# --- The step ----------------------------------------------------------------


class TrainStep:
  """The stages, composed and compiled: once for every padded length."""

  def __init__(
    self,
    graphdef,
    tx: optax.GradientTransformation,
    recipe: Recipe,
  ):
    """Args are fixed for the run.

    Args:
      graphdef: Of the policy, and of its frozen reference.
      tx: The optimizer.
      recipe: Of the run.
    """
    self._graphdef = graphdef
    self._tx, self._recipe = tx, recipe
    self.fused = jax.jit(self._fused, donate_argnums=0)
    self.prepare = jax.jit(self._prepare)
    self.finish = jax.jit(self._finish, donate_argnums=0)
    self.explain = jax.jit(self._explain)

  def _prepare(self, params, reference_params, batch: Trajectory, key):
    """Stages 1 to 3: what the update reads, and the method's metrics."""
    recipe = self._recipe
    kept, return_PG = select(batch, members=recipe.members, ratio=recipe.ratio)
    old = score(self._graphdef, params, kept, recipe)
    reference = score(self._graphdef, reference_params, kept, recipe)
    ready, metrics = weigh(kept, return_PG, old, reference, key, recipe)
    return ready, metrics

  def _finish(self, state: TrainState, ready: Ready, metrics: Metrics, key):
    """Stage 4; without a group that has spread the state stays as it is."""
    is_update = metrics['selection/kept_with_spread'] > 0
    state, more = update(
      self._graphdef, self._tx, state, ready, key, self._recipe, is_update
    )
    state = state.replace(
      step=state.step + 1,
      skipped=state.skipped + (~is_update).astype(jnp.int32),
    )
    more['selection/skipped_steps'] = state.skipped
    return state, metrics | more

  def _explain(self, params, reference_params, batch: Trajectory, key):
    """Signal and weight of every token of a batch that is not trained on."""
    recipe = dataclasses.replace(self._recipe, microbatch=batch.tokens.shape[0])
    old = score(self._graphdef, params, batch, recipe)
    reference = score(self._graphdef, reference_params, batch, recipe)
    return token_weights(batch, old, reference, key, recipe)

  def _fused(self, state: TrainState, reference_params, batch, key):
    weigh_key, order_key = jax.random.split(key)
    ready, metrics = self._prepare(
      state.params, reference_params, batch, weigh_key
    )
    return self._finish(state, ready, metrics, order_key)
