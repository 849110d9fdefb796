"""The train step: one pure function, from a batch of episodes to an update.

`stages` says what happens to a batch, `update` what happens to the models; this
composes and compiles them: all as one program, or stages and update as two that
can be timed apart. Which of the two changes nothing else.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from actfocus_jax.learner import prepare as prepare_lib
from actfocus_jax.learner import update as update_lib
from actfocus_jax.learner.prepare import (
  Metrics,
  Recipe,
  Trajectory,
  UpdateBatch,
)
from actfocus_jax.learner.state import TrainState
from actfocus_jax.parallel import mesh as meshes


@dataclasses.dataclass(frozen=True)
class Learner:
  """A model's structure and its optimizer.

  Attributes:
    graphdef: Of the model.
    tx: Its optimizer.
  """

  graphdef: Any
  tx: optax.GradientTransformation


class TrainStep:
  """The stages, composed and compiled: once for every padded length."""

  def __init__(
    self, actor: Learner, recipe: Recipe, *, critic: Learner | None = None
  ):
    """Args are fixed for the run.

    Args:
      actor: The policy; its structure is also the frozen reference's.
      recipe: Of the run.
      critic: Of PPO; None without one.
    """
    self._actor, self._critic, self._recipe = actor, critic, recipe
    self.fused = jax.jit(self._fused, donate_argnums=0)
    self.prepare = jax.jit(self._prepare)
    self.finish = jax.jit(self._finish, donate_argnums=0)
    self.explain = jax.jit(self._explain)

  def _prepare(
    self, state: TrainState, reference, batch: Trajectory, key
  ) -> tuple[UpdateBatch, Metrics]:
    """Select, score, weigh: what the update reads, and the metrics so far."""
    recipe = self._recipe
    kept, return_PG = prepare_lib.select(
      batch, members=recipe.members, ratio=recipe.ratio, rule=recipe.rule
    )
    said = self._said(state, reference, kept)
    return prepare_lib.weigh(kept, return_PG, said, key, state.step, recipe)

  def _said(self, state: TrainState, reference, batch: Trajectory):
    recipe, graphdef = self._recipe, self._actor.graphdef
    old = prepare_lib.score(
      graphdef, state.actor.params, batch, batch.sampled, recipe
    )
    asked = prepare_lib.reference_mask(batch, recipe)
    frozen = (
      prepare_lib.score(graphdef, reference, batch, asked, recipe)
      if recipe.has_reference
      else jax.tree.map(jnp.zeros_like, old)
    )
    value_BT = None
    if self._critic is not None:
      value_BT = prepare_lib.value(
        self._critic.graphdef, state.critic.params, batch, recipe
      )
    return prepare_lib.ModelScores(old, frozen, value_BT)

  def _finish(
    self, state: TrainState, ready: UpdateBatch, metrics: Metrics, key
  ) -> tuple[TrainState, Metrics]:
    """The update; without a group that has spread the state stays as it is."""
    recipe = self._recipe
    is_update = metrics['selection/kept_with_spread'] > 0
    if recipe.compares_turns:
      is_update |= jnp.any(ready.advantage_BT != 0)
    if not recipe.needs_spread:
      is_update = jnp.ones_like(is_update)
    is_warm = state.step - state.skipped >= recipe.critic_warmup

    def step_of(learner, gradient, name, is_update):
      return functools.partial(
        update_lib.step,
        tx=learner.tx,
        gradient=functools.partial(gradient, learner.graphdef, recipe=recipe),
        name=name,
        is_update=is_update,
      )

    critic_step = None
    if self._critic is not None:
      critic_step = step_of(
        self._critic, update_lib.critic_gradient, 'critic', is_update
      )
    actor, critic, more = update_lib.epochs(
      state.actor,
      state.critic,
      ready,
      key,
      recipe,
      actor_step=step_of(
        self._actor, update_lib.actor_gradient, 'actor', is_update & is_warm
      ),
      critic_step=critic_step,
    )
    skipped = (~is_update).astype(jnp.int32)
    state = TrainState(
      step=state.step + 1,
      skipped=state.skipped + skipped,
      streak=(state.streak + 1) * skipped,
      actor=actor,
      critic=critic,
    )
    more['selection/skipped_steps'] = state.skipped
    more['selection/skipped_in_a_row'] = state.streak
    return state, metrics | more

  def _explain(self, state: TrainState, reference, batch: Trajectory, key):
    """Signal and weight of every token of a batch that is not trained on."""
    recipe = dataclasses.replace(self._recipe, microbatch=batch.tokens.shape[0])
    graphdef = self._actor.graphdef
    everywhere = batch.valid
    old = prepare_lib.score(
      graphdef, state.actor.params, batch, everywhere, recipe
    )
    frozen = jax.tree.map(jnp.zeros_like, old)
    if recipe.has_reference:
      frozen = prepare_lib.score(graphdef, reference, batch, everywhere, recipe)
    said = prepare_lib.ModelScores(old, frozen, None)
    shown = prepare_lib.token_weights(batch, said, key, state.step, recipe)
    return meshes.constrain_replicated(shown)  # For every process to read.

  def _fused(self, state: TrainState, reference, batch: Trajectory, key):
    weigh_key, order_key = jax.random.split(key)
    ready, metrics = self._prepare(state, reference, batch, weigh_key)
    return self._finish(state, ready, metrics, order_key)
