"""How long episodes are: what the estimate assumes of a rollout.

A slot's life as `agent.rollout` plays it: the prompt is there, a turn is
sampled `steps` ids at a time, its observation is appended, and so on. All
slots are taken to be equally long, and the ends of their turns to be spread
evenly, so that after every call to decode some slot has ended its turn and a
padded prefill follows. That is the dear side: where turns end together, there
are fewer prefills.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Workload:
  """Tokens of one episode.

  Attributes:
    prompt_tokens: Of the opening.
    observation_tokens: Of each later observation.
    response_tokens: Sampled in a turn.
    turns: In an episode.
    context: Most tokens of an episode; what lies beyond is not played.
    steps: Ids sampled between two looks of the host.
    is_most: Whether all of it is the most that the config allows; batches are
      then padded to the longest length.
  """

  prompt_tokens: int
  observation_tokens: int
  response_tokens: int
  turns: int
  context: int
  steps: int
  is_most: bool = True

  @property
  def length(self) -> int:
    """Tokens of a whole episode."""
    more = self.turns * self.response_tokens
    more += (self.turns - 1) * self.observation_tokens
    return min(self.context, self.prompt_tokens + more)

  @property
  def sampled(self) -> int:
    """Tokens that the policy writes in an episode."""
    return sum(sampled for _, sampled in self._turns())

  def _turns(self) -> list[tuple[int, int]]:
    """(tokens before the turn, tokens sampled in it), until the context."""
    turns, start = [], self.prompt_tokens
    for _ in range(self.turns):
      sampled = min(self.response_tokens, self.context - start)
      if sampled <= 0:
        break
      turns.append((start, sampled))
      start += sampled + self.observation_tokens
    return turns

  def decoding(self) -> dict[int, float]:
    """Calls to decode, by the length that slots reach in them."""
    calls: dict[int, float] = {}
    for start, sampled in self._turns():
      for done in range(0, sampled, self.steps):
        reached = start + min(done + self.steps, sampled)
        calls[reached] = calls.get(reached, 0.0) + 1
    return calls

  def turn_ends(self) -> dict[int, float]:
    """Prefills of observations, by the length that slots reach in them."""
    turns = self._turns()
    calls: dict[int, float] = {}
    for (_, sampled), (start, _) in zip(turns, turns[1:], strict=False):
      # Each takes a quarter of the slots.
      ends = max(-(-sampled // self.steps), 4)
      calls[start] = calls.get(start, 0.0) + ends
    return calls

  def sampled_share(self, length: int) -> float:
    """Share of sampled tokens in rows padded to `length`."""
    return min(1.0, self.sampled / length)
