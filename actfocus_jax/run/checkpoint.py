"""Checkpoints of a run: saved in the background, rotated, whole or absent.

The life of one checkpoint:

1. `save` copies the arrays off the devices and returns; a thread writes them
   into a temporary folder beside the others.
2. When every byte is there the folder is renamed to its step number. A run
   killed before that leaves a temporary folder, which nobody counts as a
   checkpoint and the next run removes. A bucket cannot rename a folder: there
   the object `commit_success.txt` comes last, and a folder without it is no
   checkpoint.
3. The newest `keep` checkpoints stay, and the one with the highest success.
4. `restore` reads each array straight into the sharding asked for, which may
   belong to another mesh than the one that saved it.

On several processes each one writes the shards that it holds, a shard that
several hold is written once, and the first process renames. All of them make
the same calls and wait for each other at the end, so all need to see the same
folder: a shared disk or a bucket.

Everything that touches Orbax is in this file. Orbax sees a flat dict from the
name of a leaf to the leaf, so the layout on disk does not depend on how Orbax
treats named tuples, dataclasses or `nnx.State` today.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
from orbax import checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from actfocus_jax.run import storage

PyTree = Any

_UNMEASURED = -1.0  # below every success


class Checkpoints:
  """The checkpoints of one run, in one directory.

  Nothing is created on disk before the first save. On several hosts every
  process makes the same calls with the same steps.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    keep: int = 2,
    best_metric: str = 'success',
    read_only: bool = False,
    on_failure: Callable[[BaseException], None] | None = None,
  ):
    """Names the directory; reads and writes nothing.

    Args:
      directory: the folder that holds one folder per step.
      keep: how many of the newest checkpoints stay; the best one stays too.
      best_metric: the name under which `success` is stored with a checkpoint.
      read_only: whether to leave the directory as it is, so that a run which
        is saving there at this moment is not disturbed.
      on_failure: called in the background with what made a save fail there,
        before `wait` raises it. The other processes wait for a save that fails
        in this one, so of several it has to end this one.

    Raises:
      ValueError: `keep` is below 1.
    """
    if keep < 1:
      raise ValueError(f'keep must be at least 1, got {keep}')
    if not storage.is_remote(directory):
      directory = pathlib.Path(directory).absolute()
    self._directory = directory
    self._best_metric = best_metric
    self._read_only = read_only
    self._keep = keep
    self._on_failure = on_failure or (lambda error: None)
    self._manager: ocp.CheckpointManager | None = None

  def save(
    self,
    step: int,
    state: PyTree,
    extra: dict[str, Any],
    *,
    success: float | None = None,
  ) -> bool:
    """Starts to save `state`; the buffers may be donated once it returns.

    Args:
      step: number of train steps that `state` has seen.
      state: pytree of jax arrays (typed keys included), numpy arrays and
        Python numbers.
      extra: whatever JSON holds: metrics position, seed cursor.
      success: held-out success in [0, 1], or None where none was measured;
        a checkpoint without it is never the best.

    Returns:
      False if `step` is the newest checkpoint already, where nothing is
      written (the last periodic save and the one at exit may coincide).

    Raises:
      ValueError: `success` is not in [0, 1], `step` is older than the newest
        checkpoint, or an earlier save failed in the background.
    """
    if success is not None and not 0.0 <= success <= 1.0:
      raise ValueError(f'success at step {step} is {success}, not in [0, 1]')
    latest = self.latest_step()
    if latest is not None and step < latest:
      raise ValueError(f'step {step} is older than checkpoint {latest}')
    # Orbax itself declines the step it has, and says so by False.
    return self._open().save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(_by_name(state)),
        extra=ocp.args.JsonSave(extra),
      ),
      metrics={self._best_metric: success},
    )

  def latest_step(self) -> int | None:
    """Returns the newest whole checkpoint or one being saved, or None."""
    return self._open().latest_step() if self._exists() else None

  def all_steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, oldest first."""
    return sorted(self._open().all_steps()) if self._exists() else []

  def restore(
    self, step: int, abstract_state: PyTree
  ) -> tuple[PyTree, dict[str, Any]]:
    """Reads a checkpoint back, bit for bit.

    Args:
      step: one of `all_steps()`.
      abstract_state: pytree of the saved structure. A `ShapeDtypeStruct` (or
        an array) gives the sharding its leaf lands on, a Python number the
        type. Leaves are matched by name. It may be a part of what was saved
        (the actor without its optimizer): the rest is not read.

    Returns:
      (state, extra), the state in the structure of `abstract_state`.

    Raises:
      FileNotFoundError: no checkpoint of that step.
      ValueError: a leaf is missing or has another shape or dtype; the message
        names it.
    """
    if step not in self.all_steps():
      raise FileNotFoundError(
        f'no checkpoint of step {step} in {self._directory}; '
        f'there are {self.all_steps()}'
      )
    manager = self._open()
    manager.wait_until_finished()
    names = _by_name(abstract_state)
    _check(names, manager.item_metadata(step).state)
    restored = manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
          names,
          restore_args=ocp.checkpoint_utils.construct_restore_args(names),
          partial_restore=True,
        ),
        extra=ocp.args.JsonRestore(),
      ),
    )
    leaves = [restored.state[name] for name in names]
    treedef = jax.tree.structure(abstract_state)
    return jax.tree.unflatten(treedef, leaves), restored.extra

  def wait(self) -> None:
    """Blocks until every save is on disk; raises what a save raised."""
    if self._manager is not None:
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then ends the background threads."""
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def _rank(self, metrics: dict[str, float | None] | None) -> float:
    success = (metrics or {}).get(self._best_metric)
    return _UNMEASURED if success is None else success

  def _exists(self) -> bool:
    return self._manager is not None or self._directory.is_dir()

  def _open(self) -> ocp.CheckpointManager:
    """Makes the manager at first need: making it creates the directory."""
    if self._manager is None:
      policies = checkpoint_managers
      self._manager = _Manager(
        self._on_failure,
        self._directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=policies.AnyPreservationPolicy(
            [
              policies.LatestN(self._keep),
              policies.BestN(
                get_metric_fn=self._rank,
                n=1,
                keep_checkpoints_without_metrics=False,
              ),
            ]
          ),
          # The policy decides what stays; without best_fn no metric would be
          # written, and a restarted run would forget which one was best.
          best_fn=self._rank,
          cleanup_tmp_directories=not self._read_only,
          create=not self._read_only,
          read_only=self._read_only,
        ),
        item_handlers={
          'state': ocp.PyTreeCheckpointHandler(),
          'extra': ocp.JsonCheckpointHandler(),
        },
      )
    return self._manager


class _Manager(ocp.CheckpointManager):
  """Tells of a save that failed before it waits for the other processes.

  They never come where it waits: they wait for what this one has not written,
  for the 20 minutes that Orbax allows a save.
  """

  def __init__(
    self, on_failure: Callable[[BaseException], None], *arguments, **options
  ):
    """Takes what is told, and all that its parent takes."""
    self._on_failure = on_failure
    super().__init__(*arguments, **options)

  def _wait_for_checkpointers(self):
    try:
      super()._wait_for_checkpointers()
    except BaseException as error:
      self._on_failure(error)
      raise


def _by_name(tree: PyTree) -> dict[str, Any]:
  """Maps 'actor.params.embedding'-like names to the leaves, in tree order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  named = {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in leaves
  }
  if len(named) != len(leaves):
    raise ValueError('two leaves of the state have the same name')
  return named


def _check(wanted: dict[str, Any], saved: Any) -> None:
  """Raises where Orbax would pad, cut or cast without a word."""
  missing = [name for name in wanted if name not in saved]
  if missing:
    raise ValueError(
      f'the checkpoint has no {missing[0]!r}: {len(missing)} of '
      f'{len(wanted)} leaves are missing'
    )
  for name, leaf in wanted.items():
    if not hasattr(leaf, 'shape') or jax.dtypes.issubdtype(
      leaf.dtype, jax.dtypes.prng_key
    ):
      continue
    there = saved[name]
    found = (tuple(there.shape), there.dtype)
    if found != (tuple(leaf.shape), leaf.dtype):
      raise ValueError(
        f'{name!r} is {found[1]}{list(found[0])} in the checkpoint, '
        f'{leaf.dtype}{list(leaf.shape)} was asked for'
      )
