"""Placement of episodes on row shards and on processes."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class ShardPlacement:
  """Row shard and process of each episode, and the prompts of each shard."""

  shard: list[int]  # Row shard of each row; consecutive rows share one.
  owner: list[int]  # Process that runs the environment of each row.
  prompt: list[int]  # For each row, the index of its prompt in its shard.
  # Group of each prompt, shard after shard. All shards have the same number of
  # prompts; repetitions fill up the shorter ones.
  groups: list[int]

  @classmethod
  def of(cls, groups: Sequence[int], owners: Sequence[int]) -> 'ShardPlacement':
    """Spread the rows of `groups` evenly over shards with these `owners`."""
    shards = len(owners)
    shard = [row * shards // len(groups) for row in range(len(groups))]
    # Per shard: group -> index of its prompt there.
    index: list[dict[int, int]] = [{} for _ in owners]
    prompt = [
      index[s].setdefault(group, len(index[s]))
      for group, s in zip(groups, shard, strict=True)
    ]
    count = max(map(len, index))
    return cls(
      shard,
      [owners[s] for s in shard],
      prompt,
      [g for own in index for g in [*own, *[groups[0]] * (count - len(own))]],
    )

  def owners_of_groups(self, groups: Sequence[int]) -> list[set[int]]:
    """Return, for each group, the processes that play any of its rows."""
    owners: list[set[int]] = [set() for _ in range(max(groups) + 1)]
    for group, owner in zip(groups, self.owner, strict=True):
      owners[group].add(owner)
    return owners
