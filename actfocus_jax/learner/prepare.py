"""From a batch of episodes to what the update reads, stage by stage.

The life of one batch:

1. `select`: the groups whose members fared differently are kept.
2. `score`: policy, frozen reference and critic read every token once, as far as
   somebody asks for what they say.
3. `weigh`: signals become the weights of equation (w_t), rewards become
   advantages, both become `UpdateBatch`.

Each is a pure function; `step.TrainStep` composes and compiles them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from actfocus_jax.algorithm import (
  estimators,
  losses,
  selection,
  trajectory,
  weights,
)
from actfocus_jax.learner import microbatch as microbatch_lib
from actfocus_jax.model import scoring

Trajectory = trajectory.Trajectory
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What is chosen once per run: numbers, and functions by the stage.

  Attributes:
    members: G, the size of a group.
    ratio: Share of the groups that is kept.
    rule: Of selection.keep_groups.
    signal: (scores as keywords, key) -> signal_BT; one of signals.SIGNALS.
    has_reference: Whether anything asks the frozen reference.
    has_signal: Whether the token weights read the signal.
    needs_spread: Whether a step is skipped when no kept group has spread.
    compares_turns: Whether the advantages may tell turns apart where returns
      are equal; such a step is not skipped.
    token_weights: (signal_BT, entropy_BT, sampled_BT, action_BT, step) ->
      weight_BT.
    advantage: (rewards, values, scores and masks as keywords) ->
      estimators.Credit; one of estimators.ESTIMATORS.
    policy_loss: losses.policy_loss with its clips.
    reduction: The reduction of `policy_loss`.
    entropy_coefficient: Of the entropy bonus.
    minibatch: Rows per optimizer step; divides the kept rows.
    microbatch: Rows per forward and backward pass; divides the mini-batch.
    ratio_of: (logprob_BT, sampled_BT, turn_BT) -> logprob_BT, of which the
      ratio is made: the token's own, or its turn's mean.
    kl_coefficient: Of the KL to the reference; 0 leaves it out.
    kl_estimator: Of losses.kl.
    value_loss: losses.value_loss with its clip; None without a critic.
    critic_warmup: Iterations in which the critic learns alone.
    importance_cap: Of losses.importance_weights; None leaves them out.
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
  advantage: Callable[..., Any]
  policy_loss: Callable[..., Any]
  entropy_coefficient: float
  minibatch: int
  microbatch: int
  rule: str = 'top_k'
  has_reference: bool = True
  has_signal: bool = True
  needs_spread: bool = True
  compares_turns: bool = False
  reduction: str = 'weighted_token_mean'
  ratio_of: Callable[..., jax.Array] | None = None
  kl_coefficient: float = 0.0
  kl_estimator: str = 'k1'
  value_loss: Callable[..., Any] | None = None
  critic_warmup: int = 0
  importance_cap: float | None = None
  epochs: int = 1
  temperature: float = 1.0
  rescore: bool = True
  score_chunk: int = 512


@flax.struct.dataclass
class ModelScores:
  """What the models say of the kept rows, before the update.

  Attributes:
    old: Scores by the policy, at sampled tokens.
    reference: Scores by the reference, at the tokens that are asked for; zeros
      without one.
    value_BT: Of the critic; None without one.
  """

  old: scoring.Scores
  reference: scoring.Scores
  value_BT: jax.Array | None


@flax.struct.dataclass
class UpdateBatch:
  """Kept rows with everything that the update reads; all [B, T].

  What only a critic, a KL term or importance weights read is None without.
  """

  tokens_BT: jax.Array
  valid_BT: jax.Array
  sampled_BT: jax.Array
  turn_BT: jax.Array
  old_logprob_BT: jax.Array
  advantage_BT: jax.Array
  weight_BT: jax.Array
  ref_logprob_BT: jax.Array | None = None
  importance_BT: jax.Array | None = None
  old_value_BT: jax.Array | None = None
  return_BT: jax.Array | None = None
  critic_BT: jax.Array | None = None


# --- 1. Which groups ---------------------------------------------------------


def select(
  batch: Trajectory, *, members: int, ratio: float, rule: str = 'top_k'
) -> tuple[Trajectory, jax.Array]:
  """Keeps the groups that are worth an update.

  Args:
    batch: Group-major rows, [P * G, T].
    members: G.
    ratio: Share kept, of the groups or of their spread.
    rule: 'top_k' gathers a number of groups known beforehand; 'top_p' keeps
      all rows and takes every token of the others out of the loss.

  Returns:
    The kept rows, and their returns [kept, G].
  """
  return_PG = trajectory.episode_return(batch).reshape(-1, members)
  if rule == 'top_k':
    index_B = selection.kept_rows(return_PG, ratio=ratio)
    kept = trajectory.take_rows(batch, index_B)
    return kept, trajectory.episode_return(kept).reshape(-1, members)
  keep_P = selection.keep_groups(return_PG, ratio=ratio, rule=rule)
  keep_B1 = jnp.repeat(keep_P, members)[:, None]
  kept = batch.replace(
    sampled=batch.sampled & keep_B1, action=batch.action & keep_B1
  )
  return kept, return_PG


# --- 2. What the models say --------------------------------------------------


def score(
  graphdef, params, batch: Trajectory, mask_BT: jax.Array, recipe: Recipe
) -> scoring.Scores:
  """Scores the tokens at `mask_BT`, a micro-batch at a time; 0 elsewhere."""

  def one(part):
    return scoring.score_some(
      graphdef,
      params,
      *part,
      temperature=recipe.temperature,
      chunk=recipe.score_chunk,
    )

  parts = microbatch_lib.micro(
    (batch.tokens, batch.valid, mask_BT), recipe.microbatch
  )
  return microbatch_lib.join(jax.lax.map(one, parts))


def value(graphdef, params, batch: Trajectory, recipe: Recipe) -> jax.Array:
  """What the critic expects before each token, a micro-batch at a time."""

  def one(part):
    return scoring.value_tokens(graphdef, params, *part)

  parts = microbatch_lib.micro((batch.tokens, batch.valid), recipe.microbatch)
  return microbatch_lib.join(jax.lax.map(one, parts))


def reference_mask(batch: Trajectory, recipe: Recipe) -> jax.Array:
  """The tokens of which somebody asks what the reference says, bool [B, T].

  The weights ask at action tokens, 4 to 16 % of the sampled ones in the
  paper's runs; a KL term asks at all of them.
  """
  return batch.sampled if recipe.kl_coefficient else batch.action


# --- 3. Weights and advantages -----------------------------------------------


def token_weights(
  batch: Trajectory, said: ModelScores, key: jax.Array, step, recipe: Recipe
) -> tuple[jax.Array, jax.Array]:
  """The signal and the weight of every token, [B, T] each."""
  signal_BT = recipe.signal(
    ref_logsumexp_BT=said.reference.logsumexp_BT,
    ref_mean_logit_BT=said.reference.mean_logit_BT,
    ref_entropy_BT=said.reference.entropy_BT,
    ref_logprob_BT=said.reference.raw_logprob_BT,
    old_logprob_BT=said.old.raw_logprob_BT,
    key=key,
  )
  weight_BT = recipe.token_weights(
    signal_BT, said.old.entropy_BT, batch.sampled, batch.action, step=step
  )
  return signal_BT, weight_BT


def weigh(
  batch: Trajectory,
  return_PG: jax.Array,
  said: ModelScores,
  key: jax.Array,
  step: jax.Array,
  recipe: Recipe,
) -> tuple[UpdateBatch, Metrics]:
  """Turns scores into token weights and rewards into advantages.

  Args:
    batch: The kept rows.
    return_PG: Their returns.
    said: What the models say of them.
    key: For the random control.
    step: Finished iterations, for weights that change with them.
    recipe: Of the run.

  Returns:
    What the update reads, and the metrics of the method.
  """
  signal_BT, weight_BT = token_weights(batch, said, key, step, recipe)
  credit = recipe.advantage(
    return_PG=return_PG,
    reward_BT=batch.reward,
    value_BT=said.value_BT,
    entropy_BT=said.old.entropy_BT,
    sampled_BT=batch.sampled,
    turn_BT=batch.turn,
    anchor_BT=batch.anchor,
  )
  importance_BT = None
  if recipe.importance_cap is not None:
    importance_BT = losses.importance_weights(
      said.old.logprob_BT,
      batch.logprob,
      batch.sampled,
      cap=recipe.importance_cap,
    )
  ready = UpdateBatch(
    tokens_BT=batch.tokens,
    valid_BT=batch.valid,
    sampled_BT=batch.sampled,
    turn_BT=batch.turn,
    old_logprob_BT=said.old.logprob_BT if recipe.rescore else batch.logprob,
    advantage_BT=credit.advantage_BT,
    weight_BT=weight_BT,
    ref_logprob_BT=(
      said.reference.raw_logprob_BT if recipe.kl_coefficient else None
    ),
    importance_BT=importance_BT,
    old_value_BT=said.value_BT,
    return_BT=credit.return_BT,
    critic_BT=credit.critic_BT,
  )
  metrics = _method_metrics(batch, return_PG, signal_BT, weight_BT, recipe)
  metrics |= _sampler_metrics(batch, said.old)
  if said.value_BT is not None:
    metrics |= _critic_metrics(said.value_BT, credit)
  return ready, metrics


def _method_metrics(batch, return_PG, signal_BT, weight_BT, recipe) -> Metrics:
  spread_P = selection.group_spread(return_PG)
  kept_P = jnp.ones(spread_P.shape, bool)
  if recipe.rule == 'top_p':
    kept_P = jnp.any(batch.sampled.reshape(spread_P.size, -1), axis=1)
  metrics = {
    'weights/action_share': trajectory.masked_mean(batch.action, batch.sampled),
    'weights/action_mass': weights.action_mass(weight_BT, batch.action),
    'selection/kept': kept_P.sum(dtype=jnp.int32),
    'selection/kept_with_spread': (kept_P & (spread_P > 0)).sum(
      dtype=jnp.int32
    ),
    'selection/spread': trajectory.masked_mean(spread_P, kept_P),
  }
  if recipe.has_signal:
    mean, std = weights.signal_stats(signal_BT, batch.action)
    metrics |= {'signal/mean': mean, 'signal/std': std}
  return metrics


def _sampler_metrics(batch: Trajectory, old: scoring.Scores) -> Metrics:
  """How far the sampler's log-probs are from a fresh forward pass."""
  gap_BT = jnp.abs(old.logprob_BT - batch.logprob)
  sampled_gap_BT = jnp.where(batch.sampled, gap_BT, jnp.nan)
  p99 = jnp.nanquantile(sampled_gap_BT, 0.99)
  return {
    'rollout/sampler_gap_mean': trajectory.masked_mean(gap_BT, batch.sampled),
    'rollout/sampler_gap_p99': jnp.where(batch.sampled.any(), p99, 0.0),
    'rollout/sampler_gap_max': jnp.where(batch.sampled, gap_BT, 0.0).max(),
    'rollout/effective_sample_size': losses.effective_sample_size(
      old.logprob_BT, batch.logprob, batch.sampled
    ),
  }


def _critic_metrics(value_BT: jax.Array, credit: estimators.Credit) -> Metrics:
  """How much of the returns the critic explains before it learns from them."""
  return_BT, critic_BT = credit.return_BT, credit.critic_BT
  _, variance = trajectory.masked_moments(return_BT, critic_BT)
  _, residual = trajectory.masked_moments(return_BT - value_BT, critic_BT)
  explained = 1.0 - trajectory.divide(residual, variance)
  return {
    'critic/value_mean': trajectory.masked_mean(value_BT, critic_BT),
    'critic/return_mean': trajectory.masked_mean(return_BT, critic_BT),
    # Of returns that are all equal there is nothing to explain.
    'critic/explained_variance': jnp.where(variance > 1e-8, explained, 0.0),
  }
