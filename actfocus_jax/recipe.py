"""From a config to the learner: the models that learn, and the train step.

`algo`, `weights`, `advantage.estimator` and `learner.ratio` are looked up here,
in the dicts beside the functions they name; rooms below do not know the names.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import ml_collections

from actfocus_jax import build
from actfocus_jax.algorithm import (
  estimators,
  selection,
  signals,
  turns,
  weights,
)
from actfocus_jax.config import env_schema, schema
from actfocus_jax.learner import state as state_lib
from actfocus_jax.learner import train_step as train_step_lib
from actfocus_jax.model import transformer

ConfigDict = ml_collections.ConfigDict
FrozenConfigDict = ml_collections.FrozenConfigDict


@dataclasses.dataclass(frozen=True)
class Learners:
  """Models that learn: the policy, and with PPO a critic.

  Attributes:
    model: model that both start from.
    actor: the policy.
    critic: the critic; None without one.
  """

  model: build.Model
  actor: train_step_lib.Learner
  critic: train_step_lib.Learner | None

  def create(self) -> state_lib.TrainState:
    """Fresh state; both start from the model's weights."""
    params = self.model.weights()
    critic = None
    if self.critic is not None:
      shapes = self.model.abstract_weights(is_critic=True)
      critic = state_lib.create_model_state(
        transformer.critic_from(params, shapes), self.critic.tx
      )
    return state_lib.create(
      state_lib.create_model_state(params, self.actor.tx), critic
    )

  def abstract(self) -> state_lib.TrainState:
    """Shapes, dtypes and shardings of the state."""
    critic = None
    if self.critic is not None:
      shapes = self.model.abstract_weights(is_critic=True)
      critic = state_lib.abstract_model_state(shapes, self.critic.tx)
    shapes = self.model.abstract_weights()
    actor = state_lib.abstract_model_state(shapes, self.actor.tx)
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
    critic = train_step_lib.Learner(graphdef, tx)
  tx = state_lib.optimizer(**c.optimizer)
  return Learners(model, train_step_lib.Learner(model.graphdef, tx), critic)


def train_step(c: ConfigDict, chosen: Learners) -> train_step_lib.TrainStep:
  """The compiled train step; policy and reference are one architecture."""
  return train_step_lib.TrainStep(
    chosen.actor, train_step_config(c), critic=chosen.critic
  )


def train_step_config(c: ConfigDict) -> train_step_lib.TrainStepConfig:
  """Look up the functions that the config names, and hand on its sections."""
  estimator = schema.estimator(c)
  scheme = weights.SCHEMES[c.weights.scheme]
  return train_step_lib.TrainStepConfig(
    members=c.rollout.members,
    num_turns=env_schema.most_turns(c),
    temperature=c.rollout.temperature,
    selection=_numbers(selection.keep_groups, c.selection),
    signal=signals.SIGNALS[c.weights.signal],
    weight_scheme=scheme,
    weights=_numbers(scheme, c.weights),
    estimator=estimators.ESTIMATORS[estimator],
    advantage=dict(c.advantage[estimator]),
    logprob_pooling=turns.LOGPROB_POOLINGS[c.learner.ratio],
    loss=dict(c.loss, dual_clip=c.loss.dual_clip or None),
    entropy_coefficient=c.entropy_coefficient,
    kl=FrozenConfigDict(c.kl),
    critic=FrozenConfigDict(c.critic) if c.algo == 'ppo' else None,
    learner=FrozenConfigDict(c.learner),
    has_reference=schema.has_reference(c),
    has_signal=schema.has_signal(c),
    needs_spread=schema.skips_without_spread(c),
  )


def _numbers(function: Callable, section: ConfigDict) -> dict[str, Any]:
  """Fields of a section that are the keyword-only arguments of a function."""
  names = inspect.getfullargspec(function).kwonlyargs
  return {name: section[name] for name in names}
