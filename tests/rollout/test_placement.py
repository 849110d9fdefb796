"""Placement of episodes on row shards and processes, by hand."""

from actfocus_jax.rollout import placement


def test_placement_of_three_groups_by_hand():
  """Three groups of four on two shards of two processes, by hand."""
  groups = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
  made = placement.ShardPlacement.of(groups, [0, 1])
  assert made.shard == [0] * 6 + [1] * 6
  assert made.owner == made.shard
  # Shard 0 holds groups 0 and 1, shard 1 holds 1 and 2.
  assert made.groups == [0, 1, 1, 2]
  assert made.prompt == [0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1]
  assert made.owners_of_groups(groups) == [{0}, {0, 1}, {1}]
