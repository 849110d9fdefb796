#!/usr/bin/env bash
# Trains on GPUs under Slurm, one process per GPU; submitted from the project's root.
#
#   ACCELERATOR=cuda12 bash launch/environment.sh       once, on a machine with network access
#   sbatch [sbatch options] launch/slurm.sh --config=configs/NAME.py --workdir=DIR [training flags]
#   bash launch/slurm.sh --dry-run --config=...         print the job's command; needs no Slurm
#
# The root and DIR lie on a file system that all nodes share. Options of sbatch replace those
# below, e.g. --nodes=4 --ntasks-per-node=4 --gpus-per-node=4 --time=02:00:00 --account=A.
# The job returns to the queue and continues from its last checkpoint when its time is up, when a
# node fails, when it is preempted, and RESTARTS times (default 3) when a process has died.
#SBATCH --job-name=actfocus
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGUSR1 to this script at the end of the time; scancel sends SIGTERM.
#SBATCH --signal=B:USR1@300
set -euo pipefail

# Slurm runs a copy of this file in another directory.
root=$(dirname "$0")/..
[ -f "$root/launch/commands.sh" ] || root=${SLURM_SUBMIT_DIR:-.}
if [ ! -f "$root/launch/commands.sh" ]; then
  echo "error: the job was submitted from '$root'; allowed is sbatch launch/slurm.sh in the project's root" >&2
  exit 2
fi
# shellcheck source=launch/commands.sh
. "$root/launch/commands.sh"
case ${1:-} in
  -h | --help | help) usage ;;
  --dry-run) DRY_RUN=1 && shift ;;
  *) [ -n "${SLURM_JOB_ID:-}" ] || fail "this is not a Slurm job; allowed is sbatch launch/slurm.sh, or --dry-run" ;;
esac
cd "$ROOT"

needs_training_flags "$@"
workdir=$(training_flag --workdir "$@")
# Any other address would become a local directory of that name.
[[ ! $workdir =~ ^[A-Za-z][A-Za-z0-9+.-]*:/ || $workdir =~ ^$BUCKET ]] ||
  fail "--workdir is '$workdir'; allowed is a directory, or gs://BUCKET/RUN"
check RESTARTS "${RESTARTS:=3}" '[0-9]+' 'a count, 0 or more'
tasks=${SLURM_NTASKS_PER_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}} cpus=${SLURM_CPUS_PER_TASK:-}
if [ -n "$DRY_RUN" ]; then
  cpus=$(sed -n 's/^#SBATCH --cpus-per-task=//p' launch/slurm.sh)
else
  check .venv/.accelerator "$(cat .venv/.accelerator 2>/dev/null || true)" 'cuda1[23]' \
    'cuda12 or cuda13; run ACCELERATOR=cuda12 bash launch/environment.sh first'
fi
# Of several processes on a node, number SLURM_LOCALID uses the GPU of that number.
[ "${SLURM_NTASKS:-1}" = 1 ] || [ "$tasks" = 1 ] || [ "$tasks" = "$gpus" ] ||
  fail "--ntasks-per-node is '$tasks' with $gpus GPUs on a node; allowed is $gpus, one process per GPU, or 1, a process with all of them"

# No binding, so that every process sees all GPUs of its node. The processes end each other, so
# srun must not: its SIGTERM would replace the exit code of a refusal by 143. It kills what is
# left 600 s after the first has ended: processes wait 300 s for one that was refused before
# it joined them.
command=(srun --kill-on-bad-exit=0 --wait=600 --gpu-bind=none ${cpus:+"--cpus-per-task=$cpus"}
  .venv/bin/python -m actfocus_jax.train "$@")
if [ -n "$DRY_RUN" ]; then
  echo "As a job with$(sed -n 's/^#SBATCH -/ -/p' launch/slurm.sh | tr -d '\n'):" >&2
  run "${command[@]}"
  exit
fi

PYTHONUNBUFFERED=1 "${command[@]}" &
step=$! cause='' signalled=1
# srun sends SIGTERM on to all processes, which save and end. A signal ends `wait`, not the step.
trap 'cause=cancelled signalled=1; kill -TERM "$step" 2>/dev/null || true' TERM
trap 'cause=time signalled=1; kill -TERM "$step" 2>/dev/null || true' USR1
while [ -n "$signalled" ]; do
  signalled='' status=0
  wait "$step" || status=$?
done

# srun's exit code is the highest of its processes. 2 is a refusal, which would happen again;
# processes that waited for the refused one end with 1. 143 is scancel's SIGTERM, which does not
# always reach this script. A process killed after hanging or out of memory is 137: try again.
case $cause:$status in
  time:*) ;;
  :0 | :2 | :143 | cancelled:*) exit "$status" ;;
  *)
    [ "${SLURM_RESTART_COUNT:-0}" -lt "$RESTARTS" ] || exit "$status"
    echo "srun ended with $status; the job goes back to the queue"
    ;;
esac
scontrol requeue "$SLURM_JOB_ID"
exit "$status"
