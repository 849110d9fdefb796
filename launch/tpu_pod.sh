#!/usr/bin/env bash
# Trains on a TPU pod: one slice, or several joined over the data-center network.
#
#   bash launch/tpu_pod.sh create [--type=v5litepod-16] [--node-count=N] [--spot] [--runtime-version=V] [-- gcloud flags]
#   bash launch/tpu_pod.sh status          WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED (preempted), ...
#   bash launch/tpu_pod.sh setup           copy this tree to every worker and install it there
#   bash launch/tpu_pod.sh run [--env=KEY=VALUE ...] -- --config=configs/NAME.py --workdir=gs://BUCKET/RUN [training flags]
#   bash launch/tpu_pod.sh logs [--worker=N] [--node=N]
#   bash launch/tpu_pod.sh stop            SIGTERM: training saves and ends; the same `run` goes on
#   bash launch/tpu_pod.sh delete
#
# Every action takes --name=NAME --zone=ZONE --project=PROJECT, or has them from TPU_NAME,
# TPU_ZONE and TPU_PROJECT (--type from TPU_TYPE), and --dry-run, which prints the commands and
# runs none. A preempted pod is deleted, created and set up again; then the same `run` goes on.
# Workers without an external address (create ... -- --internal-ips) are reached by
# --tunnel-through-iap, or --internal-ip from within their network, with setup, run, logs and stop.
# With several workers gcloud wants the key in the agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail

# shellcheck source=launch/commands.sh
. "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

ACTIONS='create, status, setup, run, logs, stop, delete'
NAME=${TPU_NAME:-} ZONE=${TPU_ZONE:-} PROJECT=${TPU_PROJECT:-} TYPE=${TPU_TYPE:-}
NODES=1 RUNTIME='' SPOT='' WORKER=0 NODE=0
ENVIRONMENT=() SSH=()

ACTION=${1:-}
case $ACTION in
  create | status | setup | run | logs | stop | delete) shift ;;
  -h | --help | help) usage ;;
  *) fail "the action is '$ACTION'; allowed are $ACTIONS" ;;
esac
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) NAME=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --type=*) TYPE=${1#*=} ;;
    --node-count=*) NODES=${1#*=} ;;
    --runtime-version=*) RUNTIME=${1#*=} ;;
    --spot) SPOT=1 ;;
    --env=*) check_env "${1#*=}" && ENVIRONMENT+=("${1#*=}") ;;
    --worker=*) WORKER=${1#*=} ;;
    --node=*) NODE=${1#*=} ;;
    --internal-ip | --tunnel-through-iap | --ssh-key-file=?*) SSH+=("$1") ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) usage ;;
    --) shift && break ;;
    *) fail "the option is '$1'; allowed are --name=, --zone=, --project=, --type=, --node-count=, --runtime-version=, --spot, --env=KEY=VALUE, --worker=, --node=, --internal-ip, --tunnel-through-iap, --ssh-key-file=FILE, --dry-run and --help, and after -- what is passed on" ;;
  esac
  shift
done

check '--name (or TPU_NAME)' "$NAME" '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' 'a name of lower-case letters, digits and dashes that begins with a letter'
check '--zone (or TPU_ZONE)' "$ZONE" '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+' 'a zone such as us-central2-b'
check '--project (or TPU_PROJECT)' "$PROJECT" '[a-z][-a-z0-9.:]*[a-z0-9]' 'the id of a Google Cloud project'
check --node-count "$NODES" '[1-9][0-9]*' '1 or more slices'
check --worker "$WORKER" '[0-9]+' 'the number of one worker, 0 or more'
check --node "$NODE" '[0-9]+' 'the number of one slice, 0 or more'
case $ACTION in
  create | run) ;;
  *) [ $# -eq 0 ] || fail "'$*' stands after -- but $ACTION passes nothing on; allowed with create and run" ;;
esac

# pod VERB ARGUMENTS: gcloud, at the place of this pod. Queued resources serve every generation, several slices
# and spot capacity alike, so they are the only way taken.
pod() {
  run gcloud compute tpus queued-resources "$1" --project="$PROJECT" --zone="$ZONE" "${@:2}"
}

# reach VERB ARGUMENTS: the pod over ssh.
reach() {
  pod "$@" ${SSH[@]+"${SSH[@]}"}
}

# Runs a shell command in the home directory of every worker: of 64 at once, which is the most
# that gcloud does, and of the next 64 when all of those have returned.
everywhere() {
  reach ssh "$NAME" --node=all --worker=all --batch-size=all --command="$1"
}

create() {
  if [ -z "$RUNTIME" ]; then
    case $TYPE in
      v[234]-*[0-9]) RUNTIME=tpu-ubuntu2204-base ;;
      v5litepod-*[0-9]) RUNTIME=v2-alpha-tpuv5-lite ;;
      v5p-*[0-9]) RUNTIME=v2-alpha-tpuv5 ;;
      v6e-*[0-9]) RUNTIME=v2-alpha-tpuv6e ;;
      *) fail "--type (or TPU_TYPE) is '$TYPE'; allowed are v2-N, v3-N, v4-N, v5litepod-N, v5p-N and v6e-N, or another one with --runtime-version" ;;
    esac
  fi
  check_tpu_type '--type (or TPU_TYPE)' "$TYPE"
  local flags=(--accelerator-type="$TYPE" --runtime-version="$RUNTIME")
  # The workers of several nodes learn of each other's slices from the metadata server, as
  # those of one do: JAX and libtpu need no variables set.
  if [ "$NODES" -gt 1 ]; then
    flags+=(--node-count="$NODES" --node-prefix="$NAME")
  else
    flags+=(--node-id="$NAME")
  fi
  [ -z "$SPOT" ] || flags+=(--spot)
  pod create "$NAME" "${flags[@]}" "$@"
}

setup() {
  local archive="$ROOT/runs/tree.tar.gz" tree=actfocus_jax
  local worker="bash $tree/launch/tpu_worker.sh"
  run mkdir -p "$ROOT/runs"
  run tar -czf "$archive" --exclude=.git --exclude='./.venv*' --exclude=__pycache__ --exclude=.jax_cache \
    --exclude=.pytest_cache --exclude=.ruff_cache --exclude=./runs --exclude=./models -C "$ROOT" .
  reach scp "$archive" "$NAME:actfocus_jax.tar.gz" --node=all --worker=all --batch-size=all
  # What an earlier tree left goes away, except for its environment and its runs.
  everywhere "set -e; mkdir -p $tree; if [ -f $tree/launch/tpu_worker.sh ]; then $worker idle; fi; find $tree -mindepth 1 -maxdepth 1 ! -name .venv ! -name runs -exec rm -rf {} +; tar -xzf actfocus_jax.tar.gz -C $tree; $worker setup"
}

start() {
  needs_training_flags "$@"
  check --workdir "$(training_flag --workdir "$@")" "$BUCKET|/.+" 'gs://BUCKET/RUN, or the path of a file system that all workers share; what lies in the tree goes with the pod'
  local worker=(bash actfocus_jax/launch/tpu_worker.sh)
  [ ${#ENVIRONMENT[@]} = 0 ] || worker=(env "${ENVIRONMENT[@]}" "${worker[@]}")
  # Asked of all before any is started: half a pod would wait for the other half.
  everywhere "$(quoted "${worker[@]}" ready "$@")"
  # Returns at once, for all have to come within 300 s of the first, also those of later batches.
  everywhere "$(quoted "${worker[@]}" run "$@")"
  # For a minute from the start, so that later batches need not be watched for a minute more.
  everywhere "$(quoted "${worker[@]}" watch)"
}

needs_program gcloud
case $ACTION in
  create) create "$@" ;;
  status) pod describe "$NAME" --format='value(state.state)' ;;
  setup) setup ;;
  run) start "$@" ;;
  logs) reach ssh "$NAME" --node="$NODE" --worker="$WORKER" --command='bash actfocus_jax/launch/tpu_worker.sh logs' ;;
  stop) everywhere 'bash actfocus_jax/launch/tpu_worker.sh stop' ;;
  delete) pod delete "$NAME" --force ;;
esac
