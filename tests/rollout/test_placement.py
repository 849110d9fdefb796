"""Episodes stay where they began: homes, and programs that move no cache."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from actfocus_jax.model import architecture, transformer
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.rollout import placement, sampling

COLLECTIVE = re.compile(
  r'(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)'
  r'(?:-start)?\('
)
CONFIG = architecture.Config(96, 32, 48, 2, 4, 2, 8, rope_theta=100.0)
SLOTS, LENGTH = 16, 24


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


def ints(mesh, count, width=None):
  shape = (count,) if width is None else (count, width)
  return mesh_lib.put_rows(mesh, np.ones(shape, np.int32))


def lowered(mesh, graphdef, params):
  """The programs that place, feed and drop episodes."""
  slots = sampling.empty_on(mesh, CONFIG, SLOTS, LENGTH, jnp.float32)
  prompts = sampling.empty_on(mesh, CONFIG, 8, 8, jnp.float32)
  row = ints(mesh, SLOTS)
  eight = [ints(mesh, 8, 4), *(ints(mesh, 8) for _ in range(3))]
  return {
    'admit': sampling.admit.lower(slots, prompts, row, row, row),
    'compact': sampling.compact.lower(slots, ints(mesh, 8)),
    'prefill': sampling.prefill.lower(
      graphdef, params, slots, *eight, view=LENGTH
    ),
    'prefill_prompts': sampling.prefill_prompts.lower(
      graphdef, params, *eight[:2], config=CONFIG, dtype=jnp.float32
    ),
  }


def test_no_cache_moves_between_devices():
  mesh = mesh_lib.make_mesh(data=4, fsdp=2)
  with jax.set_mesh(mesh):
    graphdef, params = transformer.create(
      CONFIG, mesh, jax.random.key(0), dtype=jnp.float32
    )
    params = mesh_lib.decode_layout(params, mesh, jnp.float32)
    for name, program in lowered(mesh, graphdef, params).items():
      assert COLLECTIVE.findall(program.compile().as_text()) == [], name
