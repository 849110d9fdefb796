"""What a cluster says of the processes that it starts together."""

import os
from collections.abc import Mapping


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
    'Slurm': ('SLURM_STEP_NODELIST', 'SLURM_NTASKS'),
    'Open MPI': ('OMPI_MCA_orte_hnp_uri', 'OMPI_COMM_WORLD_SIZE'),
    'Open MPI 5': ('PMIX_NAMESPACE', 'OMPI_COMM_WORLD_SIZE'),
  }
  for name, (mark, count) in tasks.items():
    if mark in environ and int(environ.get(count, '1')) > 1:
      return name
  if ',' in environ.get('TPU_WORKER_HOSTNAMES', ''):
    return 'a TPU pod'
  if int(environ.get('MEGASCALE_NUM_SLICES', '1')) > 1:
    return 'several TPU slices'
  return None
