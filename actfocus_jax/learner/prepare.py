"""Stages of the train step before the update, each a pure function.

`train_step.TrainStep` composes and compiles them.
"""

import flax.struct
import jax
import jax.numpy as jnp

from actfocus_jax.algorithm import (
  estimators,
  losses,
  selection,
  signals,
  trajectory,
  weights,
)
from actfocus_jax.learner import microbatch as microbatch_lib
from actfocus_jax.model import scoring

Trajectory = trajectory.Trajectory
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class ModelScores:
  """Scores of the kept rows before the update, by policy, reference and critic.

  The reference's scores are zeros without a reference, and off the tokens of
  `reference_mask`; `value_BT` is None without a critic.
  """

  old: scoring.Scores
  reference: scoring.Scores
  value_BT: jax.Array | None


@flax.struct.dataclass
class UpdateBatch:
  """Kept rows with everything that the update reads; all [B, T].

  Arrays of a critic, a KL term or importance weights are None without these.
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


# --- Groups ------------------------------------------------------------------


def select(
  batch: Trajectory, *, members: int, ratio: float, rule: str = 'top_k'
) -> tuple[Trajectory, jax.Array]:
  """Keep the groups whose returns differ most.

  'top_k' gathers a number of groups known beforehand; 'top_p' keeps all rows
  and unmarks the sampled tokens of the other groups. `ratio` is the share
  kept, of the groups or of their spread; `members` is G. Returns the kept rows,
  group-major, and their returns [kept, G].
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


# --- Scores ------------------------------------------------------------------


def score(
  graphdef,
  params,
  batch: Trajectory,
  mask_BT: jax.Array,
  *,
  microbatch: int,
  temperature: float,
  chunk: int,
) -> scoring.Scores:
  """Score the tokens at `mask_BT`, a micro-batch at a time; 0 elsewhere."""

  def score_part(part):
    return scoring.score_some(
      graphdef, params, *part, temperature=temperature, chunk=chunk
    )

  parts = microbatch_lib.micro((batch.tokens, batch.valid, mask_BT), microbatch)
  return microbatch_lib.join(jax.lax.map(score_part, parts))


def value(graphdef, params, batch: Trajectory, *, microbatch: int) -> jax.Array:
  """Value by the critic before each token, a micro-batch at a time."""

  def value_part(part):
    return scoring.value_tokens(graphdef, params, *part)

  parts = microbatch_lib.micro((batch.tokens, batch.valid), microbatch)
  return microbatch_lib.join(jax.lax.map(value_part, parts))


def reference_mask(batch: Trajectory, *, has_kl: bool) -> jax.Array:
  """Tokens at which scores by the reference are needed, bool [B, T].

  The weights need them at action tokens, 4 to 16 % of the sampled ones in the
  paper's runs; a KL term needs them at all sampled ones.
  """
  return batch.sampled if has_kl else batch.action


# --- Inputs of the algorithm -------------------------------------------------


def signal_inputs(scores: ModelScores, key: jax.Array) -> signals.SignalInputs:
  """Inputs of signals.SIGNALS; no temperature enters them."""
  return signals.SignalInputs(
    ref_logsumexp_BT=scores.reference.logsumexp_BT,
    ref_mean_logit_BT=scores.reference.mean_logit_BT,
    ref_entropy_BT=scores.reference.entropy_BT,
    ref_logprob_BT=scores.reference.raw_logprob_BT,
    old_logprob_BT=scores.old.raw_logprob_BT,
    key=key,
  )


def weight_inputs(
  batch: Trajectory, scores: ModelScores, signal_BT: jax.Array, step: jax.Array
) -> weights.WeightInputs:
  """Inputs of weights.SCHEMES."""
  return weights.WeightInputs(
    signal_BT=signal_BT,
    entropy_BT=scores.old.entropy_BT,
    sampled_BT=batch.sampled,
    action_BT=batch.action,
    step=step,
  )


def estimator_inputs(
  batch: Trajectory, return_PG: jax.Array, scores: ModelScores, num_turns: int
) -> estimators.Inputs:
  """Inputs of estimators.ESTIMATORS."""
  return estimators.Inputs(
    return_PG=return_PG,
    reward_BT=batch.reward,
    value_BT=scores.value_BT,
    entropy_BT=scores.old.entropy_BT,
    sampled_BT=batch.sampled,
    turn_BT=batch.turn,
    anchor_BT=batch.anchor,
    num_turns=num_turns,
  )


# --- Batch and metrics -------------------------------------------------------


def update_batch(
  batch: Trajectory,
  scores: ModelScores,
  weight_BT: jax.Array,
  credit: estimators.Credit,
  *,
  old_logprob: str,
  importance_cap: float | None,
  has_kl: bool,
) -> UpdateBatch:
  """Collect what the update reads of the kept rows.

  `old_logprob` 'rescore' takes ratios against a fresh forward pass, 'sampler'
  against the log-probabilities of the rollout. `importance_cap` None leaves the
  importance weights out.
  """
  importance_BT = None
  if importance_cap is not None:
    importance_BT = losses.importance_weights(
      scores.old.logprob_BT, batch.logprob, batch.sampled, cap=importance_cap
    )
  is_rescored = old_logprob == 'rescore'
  return UpdateBatch(
    tokens_BT=batch.tokens,
    valid_BT=batch.valid,
    sampled_BT=batch.sampled,
    turn_BT=batch.turn,
    old_logprob_BT=scores.old.logprob_BT if is_rescored else batch.logprob,
    advantage_BT=credit.advantage_BT,
    weight_BT=weight_BT,
    ref_logprob_BT=scores.reference.raw_logprob_BT if has_kl else None,
    importance_BT=importance_BT,
    old_value_BT=scores.value_BT,
    return_BT=credit.return_BT,
    critic_BT=credit.critic_BT,
  )


def metrics(
  batch: Trajectory,
  return_PG: jax.Array,
  scores: ModelScores,
  signal_BT: jax.Array | None,
  weight_BT: jax.Array,
  credit: estimators.Credit,
  *,
  rule: str,
) -> Metrics:
  """Metrics of weights, selection, signal, sampler and critic.

  A `signal_BT` of None leaves the metrics of the signal out.
  """
  spread_P, old = selection.group_spread(return_PG), scores.old
  kept_P = jnp.ones(spread_P.shape, bool)
  if rule == 'top_p':
    kept_P = jnp.any(batch.sampled.reshape(spread_P.size, -1), axis=1)
  # Distance of the sampler's log-probs from those of a fresh forward pass.
  gap_BT = jnp.abs(old.logprob_BT - batch.logprob)
  p99 = jnp.nanquantile(jnp.where(batch.sampled, gap_BT, jnp.nan), 0.99)
  named = {
    'weights/action_share': trajectory.masked_mean(batch.action, batch.sampled),
    'weights/action_mass': weights.action_mass(weight_BT, batch.action),
    'selection/kept': kept_P.sum(dtype=jnp.int32),
    'selection/kept_with_spread': (kept_P & (spread_P > 0)).sum(
      dtype=jnp.int32
    ),
    'selection/spread': trajectory.masked_mean(spread_P, kept_P),
    'rollout/sampler_gap_mean': trajectory.masked_mean(gap_BT, batch.sampled),
    'rollout/sampler_gap_p99': jnp.where(batch.sampled.any(), p99, 0.0),
    'rollout/sampler_gap_max': jnp.where(batch.sampled, gap_BT, 0.0).max(),
    'rollout/effective_sample_size': losses.effective_sample_size(
      old.logprob_BT, batch.logprob, batch.sampled
    ),
  }
  if signal_BT is not None:
    mean, std = weights.signal_stats(signal_BT, batch.action)
    named |= {'signal/mean': mean, 'signal/std': std}
  if scores.value_BT is not None:
    named |= _critic_metrics(scores.value_BT, credit)
  return named


def _critic_metrics(value_BT: jax.Array, credit: estimators.Credit) -> Metrics:
  """Share of the returns that the critic explains before the update."""
  return_BT, critic_BT = credit.return_BT, credit.critic_BT
  _, variance = trajectory.masked_moments(return_BT, critic_BT)
  _, residual = trajectory.masked_moments(return_BT - value_BT, critic_BT)
  explained = 1.0 - trajectory.divide(residual, variance)
  return {
    'critic/value_mean': trajectory.masked_mean(value_BT, critic_BT),
    'critic/return_mean': trajectory.masked_mean(return_BT, critic_BT),
    # Returns that are all equal leave nothing to explain.
    'critic/explained_variance': jnp.where(variance > 1e-8, explained, 0.0),
  }
