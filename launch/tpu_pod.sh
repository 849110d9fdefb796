#!/usr/bin/env bash
# Trains on a TPU pod: one slice, or several joined over the data-center network.
#
#   bash launch/tpu_pod.sh create [--type=v5litepod-16] [--node-count=N] [--spot] [--runtime-version=V] [-- gcloud flags]
#   bash launch/tpu_pod.sh status          WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED (preempted), ...
#   bash launch/tpu_pod.sh setup           copy this tree to every worker and install it there
#   bash launch/tpu_pod.sh run [--env=KEY=VALUE ...] -- --config=configs/NAME.py --workdir=gs://BUCKET/RUN [training flags]
#   bash launch/tpu_pod.sh logs [--worker=N] [--node=N]
#   bash launch/tpu_pod.sh stop            SIGTERM: training saves and ends; the same `run` continues it
#   bash launch/tpu_pod.sh delete
#
# Every action takes --name=NAME --zone=ZONE --project=PROJECT (default TPU_NAME, TPU_ZONE and
# TPU_PROJECT; --type: TPU_TYPE), and --dry-run, which prints the commands and runs none.
# After a preemption: delete, create, setup, and the same run. setup, run, logs and stop reach
# workers without an external address (create ... -- --internal-ips) by --tunnel-through-iap, or by
# --internal-ip from within their network; --ssh-key-file=FILE names another key. For several
# workers gcloud needs the key in the ssh agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail

# shellcheck source=launch/commands.sh
. "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

NAME=${TPU_NAME:-} ZONE=${TPU_ZONE:-} PROJECT=${TPU_PROJECT:-} TYPE=${TPU_TYPE:-} RUNTIME=''
NODES=1 WORKER=0 NODE=0
spot=() environment=() ssh=()

ACTION=${1:-}
case $ACTION in -h | --help | help) usage ;; esac
check 'the action' "$ACTION" 'create|status|setup|run|logs|stop|delete' 'create, status, setup, run, logs, stop or delete'
shift
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) NAME=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --type=*) TYPE=${1#*=} ;;
    --node-count=*) NODES=${1#*=} ;;
    --runtime-version=*) RUNTIME=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --env=*) check_env "${1#*=}" && environment+=("${1#*=}") ;;
    --worker=*) WORKER=${1#*=} ;;
    --node=*) NODE=${1#*=} ;;
    --internal-ip | --tunnel-through-iap | --ssh-key-file=?*) ssh+=("$1") ;;
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
[[ $# -eq 0 || $ACTION =~ ^(create|run)$ ]] ||
  fail "'$*' stands after -- but $ACTION passes nothing on; allowed with create and run"

# pod VERB ARGUMENTS. Queued resources serve every TPU generation, several slices and spot capacity.
pod() {
  run gcloud compute tpus queued-resources "$1" --project="$PROJECT" --zone="$ZONE" "${@:2}"
}

# on_workers VERB ARGUMENTS: ssh or scp to all workers, 64 at a time, gcloud's maximum.
on_workers() {
  pod "$1" "$2" "${@:3}" --node=all --worker=all --batch-size=all ${ssh[@]+"${ssh[@]}"}
}

# worker ARGUMENTS: prints the command line for launch/tpu_worker.sh in a worker's home directory.
worker() {
  quoted ${environment[@]+env "${environment[@]}"} bash actfocus_jax/launch/tpu_worker.sh "$@"
}

create() {
  local field='--type (or TPU_TYPE)' known='v[234]-[0-9]+|v5p-[1-9][0-9]*|(v5litepod|v6e)-(1|4|8|16|32|64|128|256)' flags
  # With --runtime-version gcloud alone decides on the type.
  check "$field" "$TYPE" "$known${RUNTIME:+|[a-z0-9]+-[0-9x-]+}" 'v2-N, v3-N, v4-N, v5p-N, and v5litepod-N (v5e) and v6e-N with N one of 1, 4, 8, 16, 32, 64, 128, 256, or another type with --runtime-version'
  [[ ! $TYPE =~ ^v5p-[0-9]+$ || $((10#${TYPE#*-} % 8)) = 0 ]] ||
    fail "$field is '$TYPE'; allowed is v5p-N with N, two cores a chip, a multiple of 8"
  case ${RUNTIME:+given-}$TYPE in
    v[234]-*) RUNTIME=tpu-ubuntu2204-base ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
  esac
  flags=(--accelerator-type="$TYPE" --runtime-version="$RUNTIME" --node-id="$NAME")
  # The metadata server describes all slices to JAX and libtpu, so no variables are needed.
  [ "$NODES" = 1 ] || flags=("${flags[@]:0:2}" --node-count="$NODES" --node-prefix="$NAME")
  pod create "$NAME" "${flags[@]}" ${spot[@]+"${spot[@]}"} "$@"
}

setup() {
  local archive="$ROOT/runs/tree.tar.gz" tree=actfocus_jax
  run mkdir -p "$ROOT/runs"
  run tar -czf "$archive" --exclude=.git --exclude='./.venv*' --exclude=__pycache__ --exclude=.jax_cache \
    --exclude=.pytest_cache --exclude=.ruff_cache --exclude=./runs --exclude=./models -C "$ROOT" .
  on_workers scp "$archive" "$NAME:actfocus_jax.tar.gz"
  # Removes an earlier tree, but neither its environment nor its runs.
  on_workers ssh "$NAME" --command="set -e; mkdir -p $tree
if [ -f $tree/launch/tpu_worker.sh ]; then $(worker idle); fi
find $tree -mindepth 1 -maxdepth 1 ! -name .venv ! -name runs -exec rm -rf {} +
tar -xzf actfocus_jax.tar.gz -C $tree; $(worker setup)"
}

train() {
  needs_training_flags "$@"
  check --workdir "$(training_flag --workdir "$@")" "$BUCKET|/.+" 'gs://BUCKET/RUN, or the path of a file system that all workers share; files in the tree are lost with the pod'
  # All workers check the flags before any starts: half a pod would wait for the other half.
  on_workers ssh "$NAME" --command="$(worker ready "$@")"
  # Returns at once, since the next 64 workers must start within 300 s of the first.
  on_workers ssh "$NAME" --command="$(worker run "$@")"
  on_workers ssh "$NAME" --command="$(worker watch)"
}

needs_program gcloud
case $ACTION in
  create) create "$@" ;;
  status) pod describe "$NAME" --format='value(state.state)' ;;
  setup) setup ;;
  run) train "$@" ;;
  logs) pod ssh "$NAME" --node="$NODE" --worker="$WORKER" --command="$(worker logs)" ${ssh[@]+"${ssh[@]}"} ;;
  stop) on_workers ssh "$NAME" --command="$(worker stop)" ;;
  delete) pod delete "$NAME" --force ;;
esac
