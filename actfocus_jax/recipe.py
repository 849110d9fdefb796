"""From a config to the learner: who learns, and by which numbers.

With `assemble` this is the place of choice: `algo`, `weights`,
`advantage.estimator` and `learner.ratio` are looked up here, in literal dicts,
and nobody further down knows their names.
"""

import dataclasses
import functools

import ml_collections

from actfocus_jax import build
from actfocus_jax.algorithm import (
  estimators,
  losses,
  signals,
  turns,
  weights,
)
from actfocus_jax.config import schema
from actfocus_jax.learner import prepare
from actfocus_jax.learner import state as state_lib
from actfocus_jax.learner import step as step_lib
from actfocus_jax.model import transformer

ConfigDict = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Learners:
  """Who learns: the policy, and with PPO a critic.

  Attributes:
    model: What both start from.
    actor: The policy.
    critic: None without one.
  """

  model: build.Model
  actor: step_lib.Learner
  critic: step_lib.Learner | None

  def create(self) -> state_lib.TrainState:
    """A fresh state; both start from the model's weights."""
    params = self.model.weights()
    critic = None
    if self.critic is not None:
      shapes = self.model.abstract_weights(is_critic=True)
      critic = state_lib.trained(
        transformer.critic_from(params, shapes), self.critic.tx
      )
    return state_lib.create(state_lib.trained(params, self.actor.tx), critic)

  def abstract(self) -> state_lib.TrainState:
    """Shapes, dtypes and shardings of the state."""
    critic = None
    if self.critic is not None:
      shapes = self.model.abstract_weights(is_critic=True)
      critic = state_lib.abstract_trained(shapes, self.critic.tx)
    shapes = self.model.abstract_weights()
    actor = state_lib.abstract_trained(shapes, self.actor.tx)
    return state_lib.abstract(actor, critic)


def learners(c: ConfigDict, model: build.Model) -> Learners:
  """The policy and, for PPO, a critic of the same architecture."""
  critic = None
  if c.algo == 'ppo':
    graphdef, _ = transformer.abstract(
      model.config,
      model.dtype,
      remat=c.model.remat,
      attention=model.attention,
      is_critic=True,
    )
    tx = state_lib.optimizer(**c.critic.optimizer)
    critic = step_lib.Learner(graphdef, tx)
  tx = state_lib.optimizer(**c.optimizer)
  return Learners(model, step_lib.Learner(model.graphdef, tx), critic)


def train_step(c: ConfigDict, who: Learners) -> step_lib.TrainStep:
  """The compiled stages; policy and reference are one architecture."""
  return step_lib.TrainStep(who.actor, stages_of(c), critic=who.critic)


def stages_of(c: ConfigDict) -> prepare.Recipe:
  """The stages of the train step with their numbers."""
  ratios = {'token': None, 'turn': _turn_mean(c)}
  value_loss = functools.partial(losses.value_loss, clip=c.critic.clip)
  return prepare.Recipe(
    members=c.rollout.members,
    ratio=c.selection.ratio,
    rule=c.selection.rule,
    needs_spread=schema.skips_without_spread(c),
    compares_turns=c.advantage.estimator == 'gigpo',
    has_reference=schema.has_reference(c),
    has_signal=schema.has_signal(c),
    signal=signals.SIGNALS[c.weights.signal],
    token_weights=token_weights(c),
    advantage=estimator(c),
    policy_loss=policy_loss(c),
    reduction=c.loss.reduction,
    ratio_of=ratios[c.learner.ratio],
    entropy_coefficient=c.entropy_coefficient,
    kl_coefficient=c.kl.coefficient,
    kl_estimator=c.kl.estimator,
    value_loss=value_loss if c.algo == 'ppo' else None,
    critic_warmup=c.critic.warmup,
    importance_cap=c.learner.importance_cap,
    minibatch=c.learner.minibatch,
    microbatch=c.learner.microbatch or c.learner.minibatch,
    epochs=c.learner.epochs,
    temperature=c.rollout.temperature,
    rescore=c.learner.old_logprob == 'rescore',
    score_chunk=c.learner.score_chunk,
  )


def policy_loss(c: ConfigDict):
  """The clipped surrogate with its numbers."""
  numbers = {**c.loss, 'dual_clip': c.loss.dual_clip or None}
  return functools.partial(losses.policy_loss, **numbers)


def estimator(c: ConfigDict):
  """The advantage estimator with its numbers."""
  name = schema.estimator(c)
  numbers = dict(c.advantage[name], num_turns=schema.most_turns(c))
  return functools.partial(estimators.ESTIMATORS[name], **numbers)


def token_weights(c: ConfigDict):
  """(signal_BT, entropy_BT, sampled_BT, action_BT, step) -> weight_BT."""
  w = c.weights

  def by_action(signal_BT, entropy_BT, sampled_BT, action_BT, *, step):
    del entropy_BT
    move = functools.partial(
      weights.schedule, steps=w.schedule_steps, step=step
    )
    alpha, beta = move(w.alpha, w.alpha_end), move(w.beta, w.beta_end)
    return weights.token_weights(
      signal_BT, sampled_BT, action_BT, alpha=alpha, beta=beta
    )

  def by_entropy(signal_BT, entropy_BT, sampled_BT, action_BT, *, step):
    del signal_BT, action_BT, step
    return weights.top_entropy(entropy_BT, sampled_BT, share=w.share)

  return {'action': by_action, 'top_entropy': by_entropy}[w.scheme]


def _turn_mean(c: ConfigDict):
  most = schema.most_turns(c)

  def mean(logprob_BT, sampled_BT, turn_BT):
    mean_BK = turns.mean(logprob_BT, sampled_BT, turn_BT, turns=most)
    return turns.spread(mean_BK, sampled_BT, turn_BT)

  return mean
