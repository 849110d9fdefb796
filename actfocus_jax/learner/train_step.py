"""The train step: one pure function, from a batch of episodes to an update.

`TrainStep._train_step` is the algorithm box of arXiv 2605.14558. It is compiled
as one program, or as two that are timed apart; the results are equal. The
stages before the update are in `prepare`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from actfocus_jax.algorithm import estimators, losses, trajectory
from actfocus_jax.learner import microbatch as microbatch_lib
from actfocus_jax.learner import prepare
from actfocus_jax.learner.prepare import Metrics, Trajectory, UpdateBatch
from actfocus_jax.learner.state import ModelState, TrainState
from actfocus_jax.model import scoring
from actfocus_jax.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStepConfig:
  """Choices of a run: functions, and sections of the config with their numbers.

  Compared by identity, so that `jit` takes it as a static argument.

  Attributes:
    members: G, the size of a group.
    num_turns: K, the turns of the longest episode.
    temperature: temperature at which the batch was sampled.
    selection: keyword arguments of `prepare.select`.
    signal: one of signals.SIGNALS.
    weight_scheme: one of weights.SCHEMES.
    weights: keyword arguments of `weight_scheme`.
    estimator: one of estimators.ESTIMATORS.
    advantage: keyword arguments of `estimator`.
    logprob_pooling: one of turns.LOGPROB_POOLINGS.
    loss: keyword arguments of losses.policy_loss.
    entropy_coefficient: coefficient of the entropy bonus.
    kl: section with `coefficient` and `estimator`; a coefficient of 0 leaves
      the KL term out.
    critic: section with `clip` and `warmup`; None without a critic.
    learner: section with `minibatch`, `microbatch` (0: the mini-batch),
      `epochs`, `old_logprob`, `importance_cap` and `score_chunk`.
    has_reference: true if the KL term or the signal needs the reference.
    has_signal: true if the token weights depend on the signal.
    needs_spread: true if a step without spread in any kept group is skipped.
  """

  members: int
  num_turns: int
  temperature: float
  selection: Mapping[str, Any]
  signal: Callable[..., jax.Array]
  weight_scheme: Callable[..., jax.Array]
  weights: Mapping[str, Any]
  estimator: estimators.Estimator
  advantage: Mapping[str, Any]
  logprob_pooling: Callable[..., jax.Array]
  loss: Mapping[str, Any]
  entropy_coefficient: float
  kl: Any
  critic: Any
  learner: Any
  has_reference: bool
  has_signal: bool
  needs_spread: bool

  @property
  def microbatch(self) -> int:
    """Rows per forward and backward pass; divides the mini-batch."""
    return self.learner.microbatch or self.learner.minibatch

  @property
  def scoring(self) -> dict[str, Any]:
    """Keyword arguments of scoring.score_tokens and scoring.score_some."""
    return dict(temperature=self.temperature, chunk=self.learner.score_chunk)


@dataclasses.dataclass(frozen=True)
class Learner:
  """Structure of a model, and its optimizer."""

  graphdef: Any
  tx: optax.GradientTransformation


class TrainStep:
  """The compiled train step; one compilation for every padded length.

  `fused(state, reference, batch, key)` returns (state, metrics). Alternatively
  `prepare(state, reference, batch, key)` returns (update_batch, metrics), which
  `finish(state, update_batch, metrics, key)` takes; the key is the same one.
  `fused` and `finish` donate the state. `explain` returns signal and weight of
  every token of a batch that is not trained on.
  """

  def __init__(
    self,
    actor: Learner,
    config: TrainStepConfig,
    *,
    critic: Learner | None = None,
  ):
    """Prepare the jitted functions; compilation happens at the first call.

    The reference has the structure of the actor.
    """
    self._actor, self._critic, self._config = actor, critic, config
    self.fused = jax.jit(self._train_step, donate_argnums=0)
    self.prepare = jax.jit(self._prepare)
    self.finish = jax.jit(self._finish, donate_argnums=0)
    self.explain = jax.jit(self._explain)

  def _train_step(
    self,
    state: TrainState,
    reference: Any,
    batch: Trajectory,
    key: jax.Array,
    *,
    with_update: bool = True,
  ):
    """Select, score, signal, weights, advantages, update."""
    config = self._config
    signal_key, order_key = jax.random.split(key)
    batch, return_PG = prepare.select(
      batch, members=config.members, **config.selection
    )
    scores = self._score(state, reference, batch)
    signal_BT = config.signal(prepare.signal_inputs(scores, signal_key))
    weight_BT = config.weight_scheme(
      prepare.weight_inputs(batch, scores, signal_BT, state.step),
      **config.weights,
    )
    credit = config.estimator.compute(
      prepare.estimator_inputs(batch, return_PG, scores, config.num_turns),
      **config.advantage,
    )
    update_batch = prepare.update_batch(
      batch,
      scores,
      weight_BT,
      credit,
      old_logprob=config.learner.old_logprob,
      importance_cap=config.learner.importance_cap,
      has_kl=bool(config.kl.coefficient),
    )
    metrics = prepare.metrics(
      batch,
      return_PG,
      scores,
      signal_BT if config.has_signal else None,
      weight_BT,
      credit,
      rule=config.selection['rule'],
    )
    if not with_update:
      return update_batch, metrics
    return self._update(state, update_batch, metrics, order_key)

  def _prepare(self, state: TrainState, reference, batch: Trajectory, key):
    return self._train_step(state, reference, batch, key, with_update=False)

  def _finish(
    self, state: TrainState, update_batch: UpdateBatch, metrics: Metrics, key
  ) -> tuple[TrainState, Metrics]:
    _, order_key = jax.random.split(key)
    return self._update(state, update_batch, metrics, order_key)

  def _explain(self, state: TrainState, reference, batch: Trajectory, key):
    """Signal and weight of every token; the key is not split."""
    config = self._config
    scores = self._score_at(
      state, reference, batch, batch.valid, batch.valid, len(batch.tokens)
    )
    signal_BT = config.signal(prepare.signal_inputs(scores, key))
    weight_BT = config.weight_scheme(
      prepare.weight_inputs(batch, scores, signal_BT, state.step),
      **config.weights,
    )
    # For every process to read.
    return mesh_lib.constrain_replicated((signal_BT, weight_BT))

  def _score(self, state: TrainState, reference, batch: Trajectory):
    """Scores by policy, reference and critic, at the tokens that are needed."""
    config = self._config
    mask_BT = prepare.reference_mask(batch, has_kl=bool(config.kl.coefficient))
    scores = self._score_at(
      state, reference, batch, batch.sampled, mask_BT, config.microbatch
    )
    if self._critic is None:
      return scores
    critic = self._critic.graphdef, state.critic.params
    value_BT = prepare.value(*critic, batch, microbatch=config.microbatch)
    return scores.replace(value_BT=value_BT)

  def _score_at(
    self, state, reference, batch, old_mask_BT, ref_mask_BT, microbatch
  ) -> prepare.ModelScores:
    score = functools.partial(
      prepare.score,
      self._actor.graphdef,
      microbatch=microbatch,
      **self._config.scoring,
    )
    old = score(state.actor.params, batch, old_mask_BT)
    if self._config.has_reference:
      ref = score(reference, batch, ref_mask_BT)
    else:
      ref = jax.tree.map(jnp.zeros_like, old)
    return prepare.ModelScores(old, ref, value_BT=None)

  def _update(
    self,
    state: TrainState,
    update_batch: UpdateBatch,
    metrics: Metrics,
    order_key: jax.Array,
  ) -> tuple[TrainState, Metrics]:
    """Update the models; without anything to learn they stay as they are."""
    config = self._config
    is_update = metrics['selection/kept_with_spread'] > 0
    if config.estimator.compares_turns:
      is_update |= jnp.any(update_batch.advantage_BT != 0)
    if not config.needs_spread:
      is_update = jnp.ones_like(is_update)
    warmup = 0 if config.critic is None else config.critic.warmup
    is_warm = state.step - state.skipped >= warmup
    parts = minibatches(
      update_batch,
      order_key,
      size=config.learner.minibatch,
      epochs=config.learner.epochs,
    )
    # Neither model reads the other, so the order changes no number. A loop for
    # each: in one loop, the gradients of both would be alive together.
    actor, actor_metrics = optimize(
      state.actor,
      parts,
      functools.partial(actor_gradient, self._actor.graphdef, config=config),
      self._actor.tx,
      name='actor',
      is_update=is_update & is_warm,
    )
    critic, critic_metrics = None, {}
    if self._critic is not None:
      critic, critic_metrics = optimize(
        state.critic,
        parts,
        functools.partial(
          critic_gradient, self._critic.graphdef, config=config
        ),
        self._critic.tx,
        name='critic',
        is_update=is_update,
      )
    skipped = (~is_update).astype(jnp.int32)
    state = TrainState(
      step=state.step + 1,
      skipped=state.skipped + skipped,
      streak=(state.streak + 1) * skipped,
      actor=actor,
      critic=critic,
    )
    counts = {
      'selection/skipped_steps': state.skipped,
      'selection/skipped_in_a_row': state.streak,
    }
    return state, metrics | actor_metrics | critic_metrics | counts


# --- Optimizer steps ---------------------------------------------------------


def minibatches(
  update_batch: UpdateBatch, key: jax.Array, *, size: int, epochs: int
) -> UpdateBatch:
  """[B, T] -> [epochs * B / size, size, T].

  The rows of each epoch are in another order, which `key` names, unless there
  is one mini-batch alone.
  """
  count = update_batch.tokens_BT.shape[0]
  if count == size and epochs == 1:
    return microbatch_lib.consecutive(update_batch, count)

  def epoch(index):
    order = jax.random.permutation(jax.random.fold_in(key, index), count)
    shuffled = jax.tree.map(lambda x: x[order], update_batch)
    return microbatch_lib.consecutive(shuffled, size)

  parts = [epoch(index) for index in range(epochs)]
  return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def optimize(
  model: ModelState,
  parts: UpdateBatch,
  gradient: Callable[[Any, UpdateBatch], tuple[Any, Metrics]],
  tx: optax.GradientTransformation,
  *,
  name: str,
  is_update: jax.Array | bool = True,
) -> tuple[ModelState, Metrics]:
  """Take one optimizer step for each mini-batch.

  `gradient` maps (params, minibatch) to (gradient, metrics); `name`, 'actor' or
  'critic', is the prefix of the metrics. Without `is_update` neither parameters
  nor moments change. Metrics are averaged over optimizer steps; those whose
  name ends in `_max` are the largest of them.
  """

  def step(model, minibatch):
    grads, metrics = gradient(model.params, minibatch)
    # `top_p` can leave a mini-batch without a token; momentum and decay would
    # still move the parameters.
    moves = is_update & minibatch.sampled_BT.any()
    updates, new_opt_state = tx.update(grads, model.opt_state, model.params)
    # Here and not around the loop: a choice between whole states after it would
    # keep the old one alive beside the new one.
    updates = jax.tree.map(lambda x: jnp.where(moves, x, 0), updates)
    opt_state = jax.tree.map(
      functools.partial(jnp.where, moves), new_opt_state, model.opt_state
    )
    metrics[f'{name}/grad_norm'] = optax.tree.norm(grads)
    metrics[f'{name}/update_norm'] = optax.tree.norm(updates)
    params = optax.apply_updates(model.params, updates)
    return ModelState(params, opt_state), metrics

  model, metrics = jax.lax.scan(step, model, parts)
  return model, {
    name: x.max() if name.endswith('_max') else x.mean()
    for name, x in metrics.items()
  }


# --- Gradients ---------------------------------------------------------------


def actor_gradient(
  graphdef, params, minibatch: UpdateBatch, config: TrainStepConfig
) -> tuple[Any, Metrics]:
  """Gradient of the policy's objective over one mini-batch.

      L = policy loss - c_entropy * mean_t H_t + c_kl * mean_t KL_t

  with the policy loss a weighted mean over tokens. Denominators are sums over
  the whole mini-batch. They do not depend on the parameters, so the
  micro-batches' gradients only have to be added up. Source: arXiv 2605.14558,
  the weighted clipped objective. Returns the gradient, shaped like `params`,
  and the metrics.
  """
  policy_count = losses.denominator(
    minibatch.weight_BT, reduction=config.loss['reduction']
  )
  sampled_count = minibatch.sampled_BT.sum(dtype=jnp.float32)

  def loss_fn(params, part: UpdateBatch):
    scores = scoring.score_tokens(
      graphdef, params, part.tokens_BT, part.valid_BT, **config.scoring
    )
    pooled = functools.partial(
      config.logprob_pooling,
      sampled_BT=part.sampled_BT,
      turn_BT=part.turn_BT,
      num_turns=config.num_turns,
    )
    (policy_sum, _), metrics = losses.policy_loss(
      pooled(scores.logprob_BT),
      pooled(part.old_logprob_BT),
      part.advantage_BT,
      part.weight_BT,
      importance_BT=part.importance_BT,
      sampled_BT=part.sampled_BT,
      **config.loss,
    )
    entropy_sum, _ = losses.entropy_bonus(scores.entropy_BT, part.sampled_BT)
    policy = trajectory.divide(policy_sum, policy_count)
    entropy = trajectory.divide(entropy_sum, sampled_count)
    terms = {'policy_loss': policy, 'entropy': entropy}
    loss = policy - config.entropy_coefficient * entropy
    if config.kl.coefficient:
      kl_sum, _ = losses.kl(
        scores.raw_logprob_BT,
        part.ref_logprob_BT,
        part.sampled_BT,
        estimator=config.kl.estimator,
      )
      terms['kl'] = trajectory.divide(kl_sum, sampled_count)
      loss = loss + config.kl.coefficient * terms['kl']
    return loss, (terms | {'loss': loss}, metrics)

  grads, (terms, metrics) = _summed(loss_fn, params, minibatch, config)
  return grads, _named('actor', terms, metrics, sampled_count)


def critic_gradient(
  graphdef, params, minibatch: UpdateBatch, config: TrainStepConfig
) -> tuple[Any, Metrics]:
  """Gradient of the critic's objective over one mini-batch.

  The clipped squared error, a plain mean over the tokens of `critic_BT`.
  """
  count = minibatch.critic_BT.sum(dtype=jnp.float32)

  def loss_fn(params, part: UpdateBatch):
    value_BT = scoring.value_tokens(
      graphdef, params, part.tokens_BT, part.valid_BT
    )
    (total, _), metrics = losses.value_loss(
      value_BT,
      part.old_value_BT,
      part.return_BT,
      part.critic_BT,
      clip=config.critic.clip,
    )
    loss = trajectory.divide(total, count)
    return loss, ({'loss': loss}, metrics)

  grads, (terms, metrics) = _summed(loss_fn, params, minibatch, config)
  return grads, _named('critic', terms, metrics, count)


def _summed(loss_fn, params, minibatch: UpdateBatch, config: TrainStepConfig):
  """Add up the gradients of the micro-batches, and stack their metrics."""

  def add(total, part):
    grads, aux = jax.grad(loss_fn, has_aux=True)(params, part)
    return jax.tree.map(jnp.add, total, grads), aux

  zeros = jax.tree.map(jnp.zeros_like, params)
  parts = microbatch_lib.micro(minibatch, config.microbatch)
  return jax.lax.scan(add, zeros, parts)


def _named(name, terms, metrics, count) -> Metrics:
  """Metrics of a mini-batch from those of its micro-batches."""
  named = {f'{name}/{term}': x.sum() for term, x in terms.items()}
  for metric, x in metrics.items():
    if isinstance(x, tuple):  # A pair; its own count is that of one part.
      named[f'{name}/{metric}'] = trajectory.divide(x[0].sum(), count)
    else:
      named[f'{name}/{metric}'] = x.max()
  return named
