"""Checkpoints of a run: saved in the background, rotated, whole or absent.

A checkpoint holds a `learner.state.TrainState` and the seed of the next board.

1. `save` copies the arrays off the devices and returns. A thread writes them
   into a temporary folder beside the other checkpoints.
2. When every byte is written, the folder is renamed to its step number. A run
   killed before that leaves a temporary folder, which is not a checkpoint; the
   next run removes it. A bucket cannot rename a folder: there the object
   `commit_success.txt` comes last, and a folder without it is not a checkpoint.
3. The newest `keep` checkpoints stay, and the one with the highest success.
4. `restore` reads each array straight into the wanted sharding, which may
   belong to another mesh than the one that saved it.

Each of several processes writes the shards that it holds. A shard that several
hold is written once, and process 0 renames the folder. All processes make the
same calls and wait for each other at the end, so all need to see the same
folder: a shared disk or a bucket.

Only this file uses Orbax. Orbax sees a flat dict from the name of a leaf to the
leaf, so the layout on disk does not depend on how Orbax treats named tuples,
dataclasses or `nnx.State`.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
from orbax import checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from actfocus_jax.run import storage

PyTree = Any

_UNMEASURED = -1.0  # Below every success.


class Checkpoints:
  """Checkpoints of one run; nothing is on disk before the first save."""

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    keep: int = 2,
    read_only: bool = False,
    on_failure: Callable[[BaseException], None] | None = None,
  ):
    """Name the directory; read and write nothing.

    Args:
      directory: folder that holds one folder per step.
      keep: number of newest checkpoints that stay, at least 1.
      read_only: true to leave the directory as it is, so that a run which is
        saving there is not disturbed.
      on_failure: called in the background with the error of a failed save,
        before `wait` raises it. The other processes of a run wait for this
        save, so it should end this process.
    """
    if not storage.is_remote(directory):
      directory = pathlib.Path(directory).absolute()
    self._directory = directory
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
    """Start to save `state`; its buffers may be donated once this returns.

    Args:
      step: number of train steps behind `state`.
      state: pytree of jax arrays, numpy arrays and Python numbers.
      extra: dict of JSON values, such as the seed cursor.
      success: held-out success in [0, 1], or None if it was not measured; a
        checkpoint without it is never the best.

    Returns:
      False, and nothing is written, if `step` is the newest checkpoint already:
      the last periodic save and the one at exit may coincide.

    Raises:
      ValueError: `success` is not in [0, 1], `step` is older than the newest
        checkpoint, or an earlier save failed in the background.
    """
    if success is not None and not 0.0 <= success <= 1.0:
      raise ValueError(f'success at step {step} is {success}, not in [0, 1]')
    latest = self.latest_step()
    if latest is not None and step < latest:
      raise ValueError(f'step {step} is older than checkpoint {latest}')
    # Orbax returns False for a step that it has.
    return self._open().save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(_by_name(state)),
        extra=ocp.args.JsonSave(extra),
      ),
      metrics={'success': success},
    )

  def latest_step(self) -> int | None:
    """Return the newest step saved or being saved, or None."""
    return self._open().latest_step() if self._exists() else None

  def all_steps(self) -> list[int]:
    """Return the steps that have a checkpoint, oldest first."""
    return sorted(self._open().all_steps()) if self._exists() else []

  def restore(
    self, step: int, abstract_state: PyTree
  ) -> tuple[PyTree, dict[str, Any]]:
    """Read a checkpoint back, bit for bit.

    Args:
      step: one of `all_steps()`.
      abstract_state: pytree of the saved structure. A `ShapeDtypeStruct` (or
        an array) gives the sharding of its leaf, a Python number the type.
        Leaves are matched by name. It may be a part of what was saved, such as
        the actor without its optimizer; the rest is not read.

    Returns:
      (state, extra), the state in the structure of `abstract_state`.

    Raises:
      FileNotFoundError: there is no checkpoint of that step.
      ValueError: a leaf is missing or has another shape or dtype; names it.
    """
    if step not in self.all_steps():
      raise FileNotFoundError(
        f'no checkpoint of step {step} in {self._directory}; '
        f'there are {self.all_steps()}'
      )
    manager = self._open()
    manager.wait_until_finished()
    names = _by_name(abstract_state)
    _check_leaves(names, manager.item_metadata(step).state)
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
    """Block until every save is on disk; raise the error of a failed save."""
    if self._manager is not None:
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Wait, then end the background threads."""
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def _exists(self) -> bool:
    return self._manager is not None or self._directory.is_dir()

  def _open(self) -> ocp.CheckpointManager:
    """Create the manager when it is first needed: that creates the folder."""
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
                get_metric_fn=_rank,
                n=1,
                keep_checkpoints_without_metrics=False,
              ),
            ]
          ),
          # The policy decides what stays. Without best_fn no metric would be
          # written, and a restarted run would not know the best checkpoint.
          best_fn=_rank,
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
  """Manager that reports a failed save before it waits for other processes.

  The wait would be in vain: the others wait for what this process has not
  written, for the 20 minutes that Orbax allows a save.
  """

  def __init__(self, on_failure, *arguments, **options):
    self._on_failure = on_failure
    super().__init__(*arguments, **options)

  def _wait_for_checkpointers(self):
    try:
      super()._wait_for_checkpointers()
    except BaseException as error:
      self._on_failure(error)
      raise


def _rank(metrics: dict[str, float | None] | None) -> float:
  success = (metrics or {}).get('success')
  return _UNMEASURED if success is None else success


def _by_name(tree: PyTree) -> dict[str, Any]:
  """Map names such as 'actor.params.embedding' to the leaves, in order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  named = {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in leaves
  }
  if len(named) != len(leaves):
    raise ValueError('two leaves of the state have the same name')
  return named


def _check_leaves(wanted: dict[str, Any], saved: Any) -> None:
  """Raise where Orbax would silently pad, cut or cast."""
  missing = [name for name in wanted if name not in saved]
  if missing:
    raise ValueError(
      f'the checkpoint has no {missing[0]!r}: {len(missing)} of '
      f'{len(wanted)} leaves are missing'
    )
  for name, leaf in wanted.items():
    if not hasattr(leaf, 'shape'):  # A Python number.
      continue
    shape, dtype = tuple(saved[name].shape), saved[name].dtype
    if (shape, dtype) != (tuple(leaf.shape), leaf.dtype):
      raise ValueError(
        f'{name!r} is {dtype}{list(shape)} in the checkpoint, but '
        f'{leaf.dtype}{list(leaf.shape)} is expected'
      )
