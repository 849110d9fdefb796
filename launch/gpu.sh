#!/usr/bin/env bash
# Trains on the GPUs of one box, in a container.
#
#   bash launch/gpu.sh [--engine=docker|podman] [--gpus=all|0,1] [--accelerator=cuda12|cuda13] \
#     [--mount=DIR ...] [--env=KEY=VALUE ...] [--dry-run] -- --config=configs/NAME.py --workdir=runs/RUN [training flags]
#
# Needs the NVIDIA driver and its container toolkit. runs/ of this tree and the cache of Hugging
# Face files (HF_HOME, default ~/.cache/huggingface) are the host's; a relative workdir lies in
# runs/. --mount shows the container one more directory of the host, such as that of a model,
# read-only and under its own name. For a workdir gs://BUCKET/RUN the container gets the host's
# Google credentials (GOOGLE_APPLICATION_CREDENTIALS, or those of `gcloud auth
# application-default login`). Ctrl-C and SIGTERM save and stop; the same command goes on.
# HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and GOOGLE_CLOUD_PROJECT reach training if they are set;
# --env=KEY=VALUE sets another variable. Without a container:
#
#   ACCELERATOR=cuda12 bash launch/environment.sh && .venv/bin/python -m actfocus_jax.train ...
set -euo pipefail

# shellcheck source=launch/commands.sh
. "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

ENGINE=docker GPUS=all ACCELERATOR=cuda12
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
for mount in ${mounts[@]+"${mounts[@]}"}; do
  [[ $mount == /* && -d $mount ]] || fail "--mount is '$mount'; allowed is the absolute path of a directory"
done
check --accelerator "$ACCELERATOR" 'cuda1[23]' 'cuda12 or cuda13'
needs_training_flags "$@"
# Only runs/ outlives the container.
for flag in "$@"; do
  case $flag in
    --workdir=*/../* | --workdir=*/..) workdir= ;;
    --workdir=runs/* | --workdir=gs://*) workdir=1 ;;
    --workdir=*) workdir= ;;
    *) continue ;;
  esac
  [ -n "$workdir" ] || fail "--workdir is '${flag#*=}'; allowed is a directory runs/RUN without .., which is the host's, or gs://BUCKET/RUN"
done
model=$(training_flag --config.model.path "$@")
if [[ $model == /* ]]; then
  seen=
  for mount in ${mounts[@]+"${mounts[@]}"}; do
    [[ $model/ != "${mount%/}"/* ]] || seen=1
  done
  [ -n "$seen" ] || fail "--config.model.path is '$model', which the container does not see; allowed is a directory below a --mount=DIR, before the --"
fi
key=
if [[ $(training_flag --workdir "$@") == gs://* ]]; then
  key=${CLOUDSDK_CONFIG:-$HOME/.config/gcloud}/application_default_credentials.json
  [ -f "$key" ] || key=
  key=${GOOGLE_APPLICATION_CREDENTIALS:-$key}
  [[ -z $key || ($key == /* && -f $key) ]] ||
    fail "GOOGLE_APPLICATION_CREDENTIALS is '$key'; allowed is the absolute path of a file"
fi
needs_program "$ENGINE"

image=actfocus_jax:$ACCELERATOR
cache=${HF_HOME:-$HOME/.cache/huggingface}
flags=(
  # An init process hands signals on and collects what ends; five minutes are for saving.
  --rm --init --stop-timeout=300
  # NCCL talks between GPUs through shared memory, and the default is 64 MB.
  --shm-size=8g
  # Files in runs/ then belong to who started this.
  --user="$(id -u):$(id -g)"
  --volume="$ROOT/runs:/app/runs" --volume="$cache:/cache/huggingface"
)
for mount in ${mounts[@]+"${mounts[@]}"}; do flags+=(--volume="$mount:$mount:ro"); done
# By their names, so that no token is printed or seen among the processes.
for name in HF_TOKEN HF_ENDPOINT HF_HUB_OFFLINE GOOGLE_CLOUD_PROJECT; do
  [ -z "${!name:-}" ] || flags+=(--env="$name")
done
flags+=(${environment[@]+"${environment[@]}"})
# A machine of Google's needs no file: its metadata server answers in the container, too.
if [ -n "$key" ]; then
  flags+=(--volume="$key:/cache/google.json:ro" --env=GOOGLE_APPLICATION_CREDENTIALS=/cache/google.json)
fi
if [ "$ENGINE" = podman ]; then
  flags+=(--userns=keep-id --security-opt=label=disable)
  IFS=, read -ra numbers <<<"$GPUS"
  for number in "${numbers[@]}"; do flags+=(--device="nvidia.com/gpu=$number"); done
elif [ "$GPUS" = all ]; then
  flags+=(--gpus=all)
else
  # The quotes are Docker's: without them it takes what follows the comma for another option.
  flags+=(--gpus="\"device=$GPUS\"")
fi
# The live display wants a terminal, where there is one.
if [ -t 0 ] && [ -t 1 ]; then flags+=(--interactive --tty); fi

run mkdir -p "$ROOT/runs" "$cache"
run "$ENGINE" build --file="$ROOT/launch/Containerfile" --build-arg=ACCELERATOR="$ACCELERATOR" --tag="$image" "$ROOT"
run_last "$ENGINE" run "${flags[@]}" "$image" "$@"
