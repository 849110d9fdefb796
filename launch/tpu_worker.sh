#!/usr/bin/env bash
# What launch/tpu_pod.sh has each worker of a pod do, in the tree that it copied there.
#
#   bash launch/tpu_worker.sh setup|idle|watch|stop|logs
#   bash launch/tpu_worker.sh ready|run TRAINING FLAGS
#
# Training holds a lock on runs/pod/lock for as long as it lives. So whether it runs is asked
# of the kernel, and neither a reboot nor a process id used again gives a wrong answer.
#
#   START_SECONDS   until when after the start `watch` waits for training to end (default 60)
#   STOP_SECONDS    how long `stop` waits for training to save (default 600)
set -euo pipefail

# shellcheck source=launch/commands.sh
. "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

case ${1:-} in
  setup | idle | ready | run | train | watch | stop | logs) ;;
  -h | --help | help) usage ;;
  *) fail "the action is '${1:-}'; allowed are setup, idle, ready, run, watch, stop and logs" ;;
esac
cd "$ROOT"
mkdir -p runs/pod

# ended SECONDS: waits for training to end; fails where it still runs then.
ended() {
  flock --timeout "$1" runs/pod/lock true
}

busy() {
  fail "training runs already on $(hostname); stop it first with launch/tpu_pod.sh stop"
}

# What one worker can refuse alone is refused here: once started they would wait for each other.
ready() {
  ended 0 || busy
  [ -x .venv/bin/python ] || fail "there is no .venv on $(hostname); run launch/tpu_pod.sh setup first"
  .venv/bin/python -m actfocus_jax.train --dry_run "$@" >/dev/null
}

setup() {
  if [ -z "${PYTHON:-}" ] && [ ! -f .venv/.installed ]; then
    # The images' own Python may be 3.10; uv brings a newer one into the home directory.
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv python install 3.12
    PYTHON=$(python3 -m uv python find --managed-python 3.12)
    export PYTHON
  fi
  ACCELERATOR=tpu bash launch/environment.sh
}

start() {
  exec 9>>runs/pod/lock
  flock --nonblock 9 || busy
  rm -f runs/pod/pid runs/pod/status
  # A session of its own, with no terminal: a dropped ssh does not end it.
  PYTHONUNBUFFERED=1 setsid nohup bash launch/tpu_worker.sh train "$@" </dev/null >>runs/pod/log 2>&1 &
  exec 9>&-
  until [ -s runs/pod/pid ]; do sleep 0.1; done
}

# What `run` leaves behind: it keeps the exit code for `watch`.
train() {
  local status=0
  .venv/bin/python -m actfocus_jax.train --distributed=on "$@" &
  echo $! >runs/pod/pid
  wait $! || status=$?
  echo "$status" >runs/pod/status
}

# Some refusals come later: the workers import jax and join before they ask for the bucket,
# and make the mesh after that.
watch() {
  local age rest
  age=$(($(date +%s) - $(stat -c %Y runs/pod/pid)))
  rest=$((${START_SECONDS:-60} - age))
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

case ${1:-} in
  idle) ended 0 || busy ;;
  setup | watch | stop) "$1" ;;
  logs) exec tail -n 100 -F runs/pod/log ;;
  ready) ready "${@:2}" ;;
  run) start "${@:2}" ;;
  train) train "${@:2}" ;;
esac
