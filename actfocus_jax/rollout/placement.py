"""Where episodes live: on which row shard, with whose environment."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class ShardPlacement:
  """Which shard plays which episode, and which prompts it needs for that.

  Attributes:
    shard: Of each row: neighbours share one.
    owner: Of each row, the process that runs its environment.
    prompt: Of each row, its group's prompt among those of the shard.
    groups: The group of each prompt, shard after shard; all shards have the
      same number of them, filled up with repetitions.
  """

  shard: list[int]
  owner: list[int]
  prompt: list[int]
  groups: list[int]

  @classmethod
  def of(cls, groups: Sequence[int], owners: Sequence[int]) -> 'ShardPlacement':
    """Spreads rows with these groups evenly over shards with these owners."""
    shards = len(owners)
    shard = [row * shards // len(groups) for row in range(len(groups))]
    # Of each shard: group -> its place among those of the shard.
    own: list[dict[int, int]] = [{} for _ in owners]
    prompt = [
      own[s].setdefault(group, len(own[s]))
      for group, s in zip(groups, shard, strict=True)
    ]
    most = max(map(len, own))
    filled = [[*mine, *[groups[0]] * (most - len(mine))] for mine in own]
    return cls(
      shard,
      [owners[s] for s in shard],
      prompt,
      [group for mine in filled for group in mine],
    )

  def owners_of_groups(self, groups: Sequence[int]) -> list[set[int]]:
    """The processes that play any row of each group."""
    owners: list[set[int]] = [set() for _ in range(max(groups) + 1)]
    for group, owner in zip(groups, self.owner, strict=True):
      owners[group].add(owner)
    return owners
