#!/usr/bin/env bash
# Trains on the GPUs of one machine, in a container.
#
#   bash launch/gpu.sh [--engine=docker|podman] [--gpus=all|0,1] [--accelerator=cuda12|cuda13] \
#     [--mount=DIR ...] [--env=KEY=VALUE ...] [--dry-run] -- --config=configs/NAME.py --workdir=runs/RUN [training flags]
#
# Needs the NVIDIA driver and its container toolkit. The container shares with the host: runs/ of
# this tree, the Hugging Face cache (HF_HOME, default ~/.cache/huggingface), each --mount=DIR
# read-only under its own name, and for --workdir=gs://BUCKET/RUN the Google credentials
# (GOOGLE_APPLICATION_CREDENTIALS, or those of `gcloud auth application-default login`).
# HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and GOOGLE_CLOUD_PROJECT reach training if they are set;
# --env=KEY=VALUE sets another variable. Ctrl-C and SIGTERM save and stop; the same command
# continues the run. Without a container:
#
#   ACCELERATOR=cuda12 bash launch/environment.sh && .venv/bin/python -m actfocus_jax.train ...
set -euo pipefail

# shellcheck source=launch/commands.sh
. "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

ENGINE=docker GPUS=all ACCELERATOR=cuda12 cache=${HF_HOME:-$HOME/.cache/huggingface}
mounts=() environment=()
while [ $# -gt 0 ]; do
  case $1 in
    --engine=*) ENGINE=${1#*=} ;;
    --gpus=*) GPUS=${1#*=} ;;
    --accelerator=*) ACCELERATOR=${1#*=} ;;
    --mount=*) mounts+=("${1#*=}") ;;
    --env=*) check_env "${1#*=}" && environment+=("$1") ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help | help) usage ;;
    --) shift && break ;;
    *) fail "the option is '$1'; allowed are --engine=, --gpus=, --accelerator=, --mount=, --env=KEY=VALUE, --dry-run and --help, and after -- the training flags" ;;
  esac
  shift
done
check --engine "$ENGINE" 'docker|podman' 'docker or podman'
check --gpus "$GPUS" 'all|[0-9]+(,[0-9]+)*' 'all, or numbers such as 0,1'
check --accelerator "$ACCELERATOR" 'cuda1[23]' 'cuda12 or cuda13'
needs_training_flags "$@"
workdir=$(training_flag --workdir "$@") model=$(training_flag --config.model.path "$@")
[[ $workdir/ != */../* && $workdir =~ ^(runs/|gs://) ]] ||
  fail "--workdir is '$workdir'; allowed is a directory runs/RUN without .., which is the host's, or gs://BUCKET/RUN"

flags=(
  # --init passes signals on; 300 seconds are for saving.
  --rm --init --stop-timeout=300
  # NCCL uses shared memory between GPUs; the default of 64 MB is too small.
  --shm-size=8g
  # The files in runs/ then belong to the caller.
  --user="$(id -u):$(id -g)"
  --volume="$ROOT/runs:/app/runs" --volume="$cache:/cache/huggingface"
)
mounted=
for mount in ${mounts[@]+"${mounts[@]}"}; do
  [[ $mount == /* && -d $mount ]] || fail "--mount is '$mount'; allowed is the absolute path of a directory"
  [[ $model/ != "${mount%/}"/* ]] || mounted=1
  flags+=(--volume="$mount:$mount:ro")
done
[[ -n $mounted || $model != /* ]] ||
  fail "--config.model.path is '$model', which is not mounted in the container; allowed is a directory below a --mount=DIR, before the --"
# By name only, so that the value of HF_TOKEN is neither printed nor in the process list.
for name in HF_TOKEN HF_ENDPOINT HF_HUB_OFFLINE GOOGLE_CLOUD_PROJECT; do
  [ -z "${!name:-}" ] || flags+=(--env="$name")
done
flags+=(${environment[@]+"${environment[@]}"})
if [[ $workdir == gs://* ]]; then
  key=${CLOUDSDK_CONFIG:-$HOME/.config/gcloud}/application_default_credentials.json
  # Without a file the metadata server of a Google Cloud machine has the credentials.
  [ -f "$key" ] || key=
  key=${GOOGLE_APPLICATION_CREDENTIALS:-$key}
  [[ -z $key || ($key == /* && -f $key) ]] ||
    fail "GOOGLE_APPLICATION_CREDENTIALS is '$key'; allowed is the absolute path of a file"
  [ -z "$key" ] || flags+=(--volume="$key:/cache/google.json:ro" --env=GOOGLE_APPLICATION_CREDENTIALS=/cache/google.json)
fi
needs_program "$ENGINE"
if [ "$ENGINE" = podman ]; then
  flags+=(--userns=keep-id --security-opt=label=disable)
  for number in ${GPUS//,/ }; do flags+=(--device="nvidia.com/gpu=$number"); done
elif [ "$GPUS" = all ]; then
  flags+=(--gpus=all)
else
  # Docker needs these quotes: it splits options at commas.
  flags+=(--gpus="\"device=$GPUS\"")
fi
# The live display needs a terminal.
if [ -t 0 ] && [ -t 1 ]; then flags+=(--interactive --tty); fi

image=actfocus_jax:$ACCELERATOR
run mkdir -p "$ROOT/runs" "$cache"
run "$ENGINE" build --file="$ROOT/launch/Containerfile" --build-arg=ACCELERATOR="$ACCELERATOR" --tag="$image" "$ROOT"
training=("$ENGINE" run "${flags[@]}" "$image" "$@")
# exec, so that signals sent to this script reach the engine.
[ -n "$DRY_RUN" ] || exec "${training[@]}"
run "${training[@]}"
