"""What a cluster says of the processes that it starts together."""

import os
from collections.abc import Mapping

# It says how many processes there are and which each is, but unlike its earlier
# versions not where process 0 is; so jax does not know it.
OPEN_MPI_5 = 'Open MPI 5'


def several(environ: Mapping[str, str] = os.environ) -> str | None:
  """What says that this process is one of several, or None.

  Only what a cluster sets for the processes that it starts together is looked
  at; a machine of a pod that is logged into is not one of them. A pod of an
  indexed Kubernetes Job may or may not be, so it has to be told.

  Args:
    environ: Of this process.

  Returns:
    The name of the cluster, for people.
  """
  tasks = {
    'Open MPI': ('OMPI_MCA_orte_hnp_uri', 'OMPI_COMM_WORLD_SIZE'),
    OPEN_MPI_5: ('PMIX_NAMESPACE', 'OMPI_COMM_WORLD_SIZE'),
    'Slurm': ('SLURM_STEP_NODELIST', _slurm_count(environ)),
  }
  for name, (mark, count) in tasks.items():
    if mark in environ and int(environ.get(count, '1')) > 1:
      return name
  if ',' in environ.get('TPU_WORKER_HOSTNAMES', ''):
    return 'a TPU pod'
  if int(environ.get('MEGASCALE_NUM_SLICES', '1')) > 1:
    return 'several TPU slices'
  return None


def _slurm_count(environ: Mapping[str, str]) -> str:
  """What says how many processes a step of Slurm has.

  The shell of an interactive allocation is a step, of one process, in which
  SLURM_NTASKS is that of the allocation.
  """
  step = 'SLURM_STEP_NUM_TASKS'
  return step if step in environ else 'SLURM_NTASKS'


def count_and_index(
  environ: Mapping[str, str] = os.environ,
) -> tuple[int, int] | None:
  """How many processes Open MPI 5 started and which this is; else None."""
  if several(environ) != OPEN_MPI_5:
    return None
  return (
    int(environ['OMPI_COMM_WORLD_SIZE']),
    int(environ['OMPI_COMM_WORLD_RANK']),
  )


def local_devices(environ: Mapping[str, str] = os.environ) -> list[int] | None:
  """Which devices of its machine a process takes, for `jax.distributed`.

  Args:
    environ: Of this process.

  Returns:
    [], all of them, where Slurm or Open MPI started one process a machine: jax
    would give it the first. None leaves it to jax, and to what the user told
    it: one each on these clusters, elsewhere all.
  """
  if 'JAX_LOCAL_DEVICE_IDS' in environ:
    return None
  if 'OMPI_COMM_WORLD_LOCAL_SIZE' in environ:
    if environ['OMPI_COMM_WORLD_LOCAL_SIZE'] == '1':
      return []
    is_known = several(environ) != OPEN_MPI_5
    return None if is_known else [int(environ['OMPI_COMM_WORLD_LOCAL_RANK'])]
  nodes = environ.get('SLURM_STEP_NUM_NODES')
  is_alone = nodes and nodes == environ.get(_slurm_count(environ))
  return [] if is_alone else None
