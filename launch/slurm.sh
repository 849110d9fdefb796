#!/usr/bin/env bash
# Trains on GPUs under Slurm, one process per GPU; submitted from the project's root.
#
#   ACCELERATOR=cuda12 bash launch/environment.sh       once, where there is a network
#   sbatch [sbatch options] launch/slurm.sh --config=configs/NAME.py --workdir=DIR [training flags]
#   bash launch/slurm.sh --dry-run --config=...         prints what the job would run, with the
#                                                       options below; needs no Slurm
#
# The root and DIR lie on a file system that all nodes share. Options of sbatch overrule those
# below, e.g. --nodes=4 --ntasks-per-node=4 --gpus-per-node=4 --time=02:00:00 --account=A.
# The job goes back to the queue, and on from where it was saved, when its time is up, when a
# node fails or it is preempted, and RESTARTS times (default 3) when a process has died.
#SBATCH --job-name=actfocus
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGUSR1 to this script, not SIGTERM, so that it can tell the end of the time from scancel.
#SBATCH --signal=B:USR1@300
set -euo pipefail

case ${1:-} in
  -h | --help | help)
    awk 'NR > 1 && /^#[S]BATCH/ {exit} NR > 1 {sub(/^# ?/, ""); print}' "$0"
    exit 0
    ;;
esac
# Slurm runs a copy of this file, so its own place says nothing about the project's.
cd "${SLURM_SUBMIT_DIR:-.}"
dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
  cd "$(dirname "$0")/.."
  SLURM_CPUS_PER_TASK=$(sed -n 's/^#[S]BATCH --cpus-per-task=//p' launch/slurm.sh)
elif [ -z "${SLURM_JOB_ID:-}" ] || [ ! -f launch/commands.sh ]; then
  echo "error: this is no Slurm job submitted from the project's root; allowed is sbatch launch/slurm.sh there" >&2
  exit 2
fi
# shellcheck source=launch/commands.sh
. launch/commands.sh
DRY_RUN=$dry_run

TASKS=${SLURM_NTASKS_PER_NODE:-1} GPUS=${SLURM_GPUS_ON_NODE:-$TASKS}
needs_training_flags "$@"
check_workdir_scheme "$(training_flag --workdir "$@")"
check RESTARTS "${RESTARTS:=3}" '[0-9]+' 'a count, 0 or more'
[ -n "$DRY_RUN" ] || check .venv/.accelerator "$(cat .venv/.accelerator 2>/dev/null || true)" 'cuda1[23]' \
  'cuda12 or cuda13; run ACCELERATOR=cuda12 bash launch/environment.sh first'
# Of several processes of a node that with SLURM_LOCALID n has the n-th GPU; one alone has all.
[ "${SLURM_NTASKS:-1}" = 1 ] || [ "$TASKS" = 1 ] || [ "$TASKS" = "$GPUS" ] ||
  fail "--ntasks-per-node is '$TASKS' with $GPUS GPUs on a node; allowed is $GPUS, one process per GPU, or 1, a process with all of them"

# For the same reason every process must see all GPUs of its node: no binding.
# The processes end each other, so srun must not: its SIGTERM to those still there would hide
# a refusal or an error behind 143. It kills what is left WAIT seconds after the first has
# ended, which must be longer than the 300 s in which they wait for one that was refused
# before it joined them: else that refusal would be hidden, too.
WAIT=600
flags=(--kill-on-bad-exit=0 --wait="$WAIT" --gpu-bind=none)
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || flags+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
export PYTHONUNBUFFERED=1
command=(srun "${flags[@]}" .venv/bin/python -m actfocus_jax.train "$@")
if [ -n "$DRY_RUN" ]; then
  echo "As a job with$(sed -n 's/^#[S]BATCH -/ -/p' launch/slurm.sh | tr -d '\n'):" >&2
  run "${command[@]}"
  exit 0
fi
"${command[@]}" &
step=$!

# srun hands SIGTERM to all processes, which save and end.
cause=
# shellcheck disable=SC2317,SC2329  # The traps call it.
forward() {
  cause=$1 signalled=1
  kill -TERM "$step" 2>/dev/null || true
}
trap 'forward cancelled' TERM
trap 'forward time' USR1
# A signal ends `wait`, not the step.
signalled=1
while [ -n "$signalled" ]; do
  signalled='' status=0
  wait "$step" || status=$?
done

# srun's status is the highest of its processes, 128 and the signal for one that was killed.
# 2 is a refusal, which a second try would meet again: also that of one alone, for those who
# wait for it in vain end with 1. 143 is scancel's SIGTERM to the processes, which is not
# always told to this script. What hung until srun killed it is 137, as is one that was out
# of memory, and worth another try.
case $cause:$status in
  time:*) scontrol requeue "$SLURM_JOB_ID" ;;
  :0 | :2 | :143 | cancelled:*) ;;
  *)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$RESTARTS" ]; then
      echo "srun ended with $status; the job goes back to the queue"
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$status"
