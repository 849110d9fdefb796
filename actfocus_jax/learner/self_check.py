"""Before the first update: is what should be equal, equal?

A mask that is off by one, a padding that leaks or a reference that is another
model trains without an error and learns nothing, or the wrong thing. On the
first batch of a run the answers are known:

1. Rewards are finite floats (in an int array 0.7 would be 0).
2. Ratios are 1: the update's own pass says what the scoring pass says.
3. The sampler says so too, up to rounding.
4. The policy is the reference still: their log-probs are equal.
5. Other ids in the padding change nothing.
6. What several devices hold a copy of is equal on all of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from actfocus_jax.learner import microbatch as microbatch_lib
from actfocus_jax.learner import prepare
from actfocus_jax.learner.prepare import Recipe, Trajectory
from actfocus_jax.learner.state import TrainState
from actfocus_jax.model import scoring
from actfocus_jax.parallel import mesh as meshes


class Failed(RuntimeError):
  """A check failed; says what it means."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """Largest mean differences of log-probs, in nats per sampled token.

  Attributes:
    ratio: Between scoring pass and update pass.
    sampler: Between sampler and scoring pass.
    reference: Between policy and reference.
    padding: Between two contents of the padding.
  """

  ratio: float
  sampler: float
  reference: float
  padding: float


# Float32 sums in another order differ by some 1e-6; bfloat16 keeps 8 bits of
# every activation, so batch shapes alone move log-probs by a few 1e-2.
EXACT = Limits(ratio=1e-4, sampler=1e-3, reference=1e-4, padding=1e-5)
ROUNDED = Limits(ratio=0.05, sampler=0.1, reference=0.05, padding=0.02)


def run(
  graphdef,
  state: TrainState,
  reference: Any,
  batch: Trajectory,
  recipe: Recipe,
  *,
  limits: Limits,
) -> dict[str, float]:
  """Checks a fresh state and its first batch.

  Args:
    graphdef: Of the policy.
    state: At step 0.
    reference: Parameters of the frozen reference, or None without one.
    batch: Of the first rollout.
    recipe: Of the run.
    limits: What still counts as equal.

  Returns:
    What was measured, by name.

  Raises:
    Failed: At the first thing that is not as it should be.
  """
  _check_rewards(batch)
  measure = jax.jit(_measure, static_argnames=('graphdef', 'recipe'))
  found = measure(graphdef, state.actor.params, reference, batch, recipe)
  found = {name: float(x) for name, x in found.items()}
  for name, value in found.items():
    limit = getattr(limits, name)
    if not value <= limit:
      raise Failed(
        f'Self-check before the first update: {_MEANING[name]} (mean '
        f'difference of log-probs {value:.3g} nats, allowed {limit:g}). '
        'learner.self_check=False trains nevertheless.'
      )
  _check_copies(state)
  return found


_MEANING = {
  'ratio': 'the update does not see the policy that was scored, so ratios '
  'are not 1',
  'sampler': 'the sampler drew from another policy than the one that is '
  'trained: cache, positions or temperature differ',
  'reference': 'the frozen reference is not the model that training starts '
  'from',
  'padding': 'ids in the padding change what is said of real tokens, so '
  'padding is being attended to',
}


def _check_rewards(batch: Trajectory):
  if not jnp.issubdtype(batch.reward.dtype, jnp.floating):
    raise Failed(
      f'Self-check before the first update: rewards are {batch.reward.dtype}, '
      'which cuts them to whole numbers; they must be floats.'
    )
  if not bool(jnp.isfinite(batch.reward).all()):
    raise Failed('Self-check before the first update: a reward is not finite.')


def _measure(graphdef, params, reference, batch, recipe) -> dict[str, Any]:
  """Mean differences at the sampled tokens of the rows that are kept."""
  batch, _ = prepare.select(
    batch, members=recipe.members, ratio=recipe.ratio, rule=recipe.rule
  )
  sampled_BT = batch.sampled
  count = jnp.maximum(sampled_BT.sum(dtype=jnp.float32), 1.0)

  def apart(a_BT, b_BT):
    return jnp.where(sampled_BT, jnp.abs(a_BT - b_BT), 0.0).sum() / count

  def update_pass(part):
    return scoring.score_tokens(
      graphdef,
      params,
      *part,
      temperature=recipe.temperature,
      chunk=recipe.score_chunk,
    )

  old = prepare.score(graphdef, params, batch, sampled_BT, recipe)
  parts = microbatch_lib.micro((batch.tokens, batch.valid), recipe.microbatch)
  update = microbatch_lib.join(jax.lax.map(update_pass, parts))
  other = batch.replace(tokens=jnp.where(batch.valid, batch.tokens, 1))
  padded = prepare.score(graphdef, params, other, sampled_BT, recipe)
  found = {
    'ratio': apart(update.logprob_BT, old.logprob_BT),
    'sampler': apart(batch.logprob, old.logprob_BT),
    'padding': apart(padded.logprob_BT, old.logprob_BT),
  }
  if reference is not None:
    frozen = prepare.score(graphdef, reference, batch, sampled_BT, recipe)
    found['reference'] = apart(frozen.raw_logprob_BT, old.raw_logprob_BT)
  return found


def _check_copies(state: TrainState):
  """Every device that holds the same part of an array must hold the same."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    if not isinstance(leaf.sharding, NamedSharding):
      continue
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    used = {axis for part in spec for axis in _axes(part)}
    sums = meshes.fetch(mesh, _local_sums(mesh, spec)(leaf))
    for i, axis in enumerate(mesh.axis_names):
      copies = np.moveaxis(sums, i, 0)
      if axis not in used and (copies != copies[:1]).any():
        raise Failed(
          'Self-check before the first update: devices along the mesh axis '
          f'{axis} hold different copies of {jax.tree_util.keystr(path)}; '
          'gradients would not be shared.'
        )


def _axes(part: Any) -> tuple[str, ...]:
  if part is None:
    return ()
  return part if isinstance(part, tuple) else (part,)


@functools.cache
def _local_sums(mesh, spec):
  """Every device's sum of what it holds, laid out like the mesh.

  The same program on equal numbers gives equal bits.
  """

  def local(x):
    return jnp.sum(x, dtype=jnp.float32).reshape((1,) * len(mesh.axis_names))

  return jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=spec,
      out_specs=P(*mesh.axis_names),
      check_vma=False,
    )
  )
