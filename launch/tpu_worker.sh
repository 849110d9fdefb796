#!/usr/bin/env bash
# Runs on each worker of a pod, in the tree that launch/tpu_pod.sh copied there.
#
#   bash launch/tpu_worker.sh setup|idle|watch|stop|logs
#   bash launch/tpu_worker.sh ready|run TRAINING FLAGS
#
#   START_SECONDS   seconds from the start of training during which `watch` reports its end (default 60)
#   STOP_SECONDS    seconds that `stop` waits for training to save (default 600)
#
# Training holds a lock on runs/pod/lock while it lives. A process id alone could be reused.
set -euo pipefail

# shellcheck source=launch/commands.sh
. "$(dirname "${BASH_SOURCE[0]}")/commands.sh"
action=${1:-}
case $action in -h | --help | help) usage ;; esac
check 'the action' "$action" 'setup|idle|ready|run|watch|stop|logs' 'setup, idle, ready, run, watch, stop or logs'
cd "$ROOT"
mkdir -p runs/pod

# ended SECONDS: waits for training to end; fails if it still runs then.
ended() {
  flock --timeout "$1" runs/pod/lock true
}

# Takes the lock for this shell and the processes that it starts.
idle() {
  exec 9>>runs/pod/lock
  flock --nonblock 9 || fail "training runs already on $(hostname); stop it first with launch/tpu_pod.sh stop"
}

setup() {
  if [ -z "${PYTHON:-}" ] && [ ! -f .venv/.installed ]; then
    # The Python of the TPU images may be 3.10; uv installs a newer one in the home directory.
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv python install 3.12
    PYTHON=$(python3 -m uv python find --managed-python 3.12)
    export PYTHON
  fi
  ACCELERATOR=tpu bash launch/environment.sh
}

ready() {
  idle
  [ -x .venv/bin/python ] || fail "there is no .venv on $(hostname); run launch/tpu_pod.sh setup first"
  .venv/bin/python -m actfocus_jax.train --dry_run "$@" >/dev/null
}

start() {
  idle
  rm -f runs/pod/pid runs/pod/status
  # A session of its own without a terminal survives the end of ssh.
  # shellcheck disable=SC2016  # The inner shell expands these.
  PYTHONUNBUFFERED=1 setsid nohup bash -c '
    .venv/bin/python -m actfocus_jax.train --distributed=on "$@" &
    echo $! >runs/pod/pid
    wait $!
    echo $? >runs/pod/status' train "$@" </dev/null >>runs/pod/log 2>&1 &
  until [ -s runs/pod/pid ]; do sleep 0.1; done
}

# Some refusals come after the start: training first imports jax, joins and makes the mesh.
watch() {
  local rest=$((${START_SECONDS:-60} - $(date +%s) + $(stat -c %Y runs/pod/pid)))
  if ended $((rest > 0 ? rest : 0)); then
    tail -n 5 runs/pod/log >&2
    exit "$(cat runs/pod/status || echo 1)"
  fi
  echo "training runs on $(hostname) as process $(cat runs/pod/pid)"
}

stop() {
  if ended 0; then
    echo "no training runs on $(hostname)"
    return
  fi
  kill -TERM "$(cat runs/pod/pid)"
  ended "${STOP_SECONDS:-600}" ||
    fail "training still runs on $(hostname) ${STOP_SECONDS:-600} seconds after SIGTERM; see runs/pod/log there"
}

shift
case $action in
  run) start "$@" ;;
  logs) exec tail -n 100 -F runs/pod/log ;;
  *) "$action" "$@" ;;
esac
