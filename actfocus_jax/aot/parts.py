"""Abstract arrays that outlive a program: what is in memory around it."""

import dataclasses
from typing import Any

from actfocus_jax.rollout import sampling


@dataclasses.dataclass(frozen=True)
class Seats:
  """Abstract arrays of a rollout.

  Attributes:
    slots: In which episodes decode, with the cache.
    prompts: The slots of the groups' openings.
  """

  slots: sampling.Slots
  prompts: sampling.Slots

  @property
  def batch(self) -> int:
    """Slots that decode together."""
    return self.slots.last_B.shape[0]

  @property
  def prompt_rows(self) -> int:
    """Rows of the prefill of the openings."""
    return self.prompts.last_B.shape[0]


@dataclasses.dataclass(frozen=True)
class Parts:
  """Abstract arrays that outlive a program, with their shardings.

  Attributes:
    state: Of training.
    reference: The frozen copy; None without one.
    decoding: The copy that decodes.
    training: Of its rollouts.
    evaluation: Of its rollouts.
    batch: Of all episodes, at the longest length.
  """

  state: Any
  reference: Any
  decoding: Any
  training: Seats
  evaluation: Seats
  batch: Any

  @property
  def seats(self) -> Seats:
    """Those with the most slots; of as many, those of training."""
    both = (self.training, self.evaluation)
    return max(both, key=lambda seats: seats.batch)

  @property
  def readers(self) -> Seats:
    """Those with the most prompts, likewise."""
    both = (self.training, self.evaluation)
    return max(both, key=lambda seats: seats.prompt_rows)

  def named(self) -> dict[str, Any]:
    """Part -> its arrays, as memory tables name them."""
    critic = self.state.critic
    optimizers = [self.state.actor.opt_state]
    optimizers += [critic.opt_state] if critic else []
    return {
      'actor': self.state.actor.params,
      'critic': critic.params if critic else None,
      'optimizers': optimizers,
      'reference': self.reference,
      'decoding copy': self.decoding,
      'cache': self.seats.slots,
      'prompt cache': self.readers.prompts,
      'batch': self.batch,
    }
