"""Consistency checks before the first update.

A mask that is off by one, a padding that leaks or a reference that is another
model trains without an error and learns nothing, or the wrong thing. On the
first batch of a run the answers are known:

1. Rewards are finite floats (in an int array 0.7 would be 0).
2. Ratios are 1: update pass and scoring pass give the same log-probs.
3. So does the sampler, up to rounding.
4. The policy still is the reference: their log-probs are equal.
5. Other ids in the padding change nothing.
6. Copies of an array on several devices are equal.
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
from actfocus_jax.learner.prepare import Trajectory
from actfocus_jax.learner.state import TrainState
from actfocus_jax.learner.train_step import TrainStepConfig
from actfocus_jax.model import scoring
from actfocus_jax.parallel import mesh as mesh_lib


class Failed(RuntimeError):
  """A failed check; the message explains its meaning."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """Largest mean differences of log-probs, in nats per sampled token."""

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
  config: TrainStepConfig,
  *,
  limits: Limits,
) -> dict[str, float]:
  """Check a fresh state and its first batch.

  Returns the measured differences by name; without a reference (None) one less.

  Raises:
    Failed: the first check that fails.
  """
  _check_rewards(batch)
  measure = jax.jit(_measure, static_argnames=('graphdef', 'config'))
  gaps = measure(graphdef, state.actor.params, reference, batch, config)
  gaps = {name: float(x) for name, x in gaps.items()}
  for name, value in gaps.items():
    limit = getattr(limits, name)
    if not value <= limit:
      raise Failed(
        f'Self-check before the first update: {_MEANING[name]} (mean '
        f'difference of log-probs {value:.3g} nats, allowed {limit:g}). '
        'learner.self_check=False trains nevertheless.'
      )
  _check_copies(state)
  return gaps


_MEANING = {
  'ratio': 'the update does not see the policy that was scored, so ratios '
  'are not 1',
  'sampler': 'the sampler drew from another policy than the one that is '
  'trained: cache, positions or temperature differ',
  'reference': 'the frozen reference is not the model that training starts '
  'from',
  'padding': 'ids in the padding change the scores of real tokens, so padding '
  'is being attended to',
}


def _check_rewards(batch: Trajectory):
  if not jnp.issubdtype(batch.reward.dtype, jnp.floating):
    raise Failed(
      f'Self-check before the first update: rewards are {batch.reward.dtype}, '
      'which cuts them to whole numbers; they must be floats.'
    )
  if not bool(jnp.isfinite(batch.reward).all()):
    raise Failed('Self-check before the first update: a reward is not finite.')


def _measure(graphdef, params, reference, batch, config) -> dict[str, Any]:
  """Mean differences at the sampled tokens of the rows that are kept."""
  batch, _ = prepare.select(batch, members=config.members, **config.selection)
  sampled_BT = batch.sampled
  count = jnp.maximum(sampled_BT.sum(dtype=jnp.float32), 1.0)

  def mean_gap(a_BT, b_BT):
    return jnp.where(sampled_BT, jnp.abs(a_BT - b_BT), 0.0).sum() / count

  def score(params, batch):
    return prepare.score(
      graphdef,
      params,
      batch,
      sampled_BT,
      microbatch=config.microbatch,
      **config.scoring,
    )

  def update_pass(part):
    return scoring.score_tokens(graphdef, params, *part, **config.scoring)

  old = score(params, batch)
  parts = microbatch_lib.micro((batch.tokens, batch.valid), config.microbatch)
  update = microbatch_lib.join(jax.lax.map(update_pass, parts))
  other = batch.replace(tokens=jnp.where(batch.valid, batch.tokens, 1))
  padded = score(params, other)
  gaps = {
    'ratio': mean_gap(update.logprob_BT, old.logprob_BT),
    'sampler': mean_gap(batch.logprob, old.logprob_BT),
    'padding': mean_gap(padded.logprob_BT, old.logprob_BT),
  }
  if reference is not None:
    frozen = score(reference, batch)
    gaps['reference'] = mean_gap(frozen.raw_logprob_BT, old.raw_logprob_BT)
  return gaps


def _check_copies(state: TrainState):
  """Check that devices which hold the same part of an array hold equal bits."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    if not isinstance(leaf.sharding, NamedSharding):
      continue
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    used = {axis for part in spec for axis in _axes(part)}
    sums = mesh_lib.fetch(mesh, _local_sums(mesh, spec)(leaf))
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
  """Function that sums what each device holds, laid out like the mesh.

  The same program on equal numbers gives equal bits.
  """

  def local(x):
    return jnp.sum(x, dtype=jnp.float32).reshape((1,) * len(mesh.axis_names))

  out = P(*mesh.axis_names)
  return jax.jit(
    jax.shard_map(
      local, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False
    )
  )
