#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, through xpk (1.16, whose flags these are).
#
#   bash launch/gke_xpk.sh image --docker-image=IMAGE           build launch/Containerfile for TPUs and push it
#   bash launch/gke_xpk.sh create --workload=NAME --tpu-type=v5litepod-16 [--num-slices=N] \
#     --docker-image=IMAGE | --base-docker-image=IMAGE --script-dir=DIR \
#     [--max-restarts=N] [--env=KEY=VALUE ...] [--xpk-flag=--spot ...] -- --config=configs/NAME.py --workdir=gs://BUCKET/RUN [training flags]
#   bash launch/gke_xpk.sh list
#   bash launch/gke_xpk.sh logs --workload=NAME [--slice=N] [--worker=N] [--location=ZONE]
#   bash launch/gke_xpk.sh delete --workload=NAME
#
# All but image take --cluster=NAME --zone=ZONE --project=PROJECT, or have them from
# XPK_CLUSTER, XPK_ZONE and XPK_PROJECT. logs takes the cluster for one of the zone's region
# unless --location (XPK_LOCATION) names where it is. --xpk-flag hands a flag of its own to xpk,
# such as --reservation=R, --priority=high or --storage=S. --dry-run prints the commands and runs none. With
# --base-docker-image xpk copies all of DIR, the project's root in a clean checkout, into a
# local image that has what requirements.txt and jax[tpu] name.
set -euo pipefail

# shellcheck source=launch/commands.sh
. "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

ACTIONS='image, create, list, logs, delete'
CLUSTER=${XPK_CLUSTER:-} ZONE=${XPK_ZONE:-} PROJECT=${XPK_PROJECT:-}
LOCATION=${XPK_LOCATION:-}
WORKLOAD='' TYPE='' SLICES=1 IMAGE='' BASE='' DIR='' RESTARTS=10 SLICE=0 WORKER=0
ENVIRONMENT=(--env=PYTHONUNBUFFERED=1) OTHERS=()

ACTION=${1:-}
case $ACTION in
  image | create | list | logs | delete) shift ;;
  -h | --help | help) usage ;;
  *) fail "the action is '$ACTION'; allowed are $ACTIONS" ;;
esac
while [ $# -gt 0 ]; do
  case $1 in
    --cluster=*) CLUSTER=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --workload=*) WORKLOAD=${1#*=} ;;
    --tpu-type=*) TYPE=${1#*=} ;;
    --num-slices=*) SLICES=${1#*=} ;;
    --docker-image=*) IMAGE=${1#*=} ;;
    --base-docker-image=*) BASE=${1#*=} ;;
    --script-dir=*) DIR=${1#*=} ;;
    --max-restarts=*) RESTARTS=${1#*=} ;;
    --env=*) check_env "${1#*=}" && ENVIRONMENT+=("$1") ;;
    --xpk-flag=--[a-z]*) OTHERS+=("${1#*=}") ;;
    --location=*) LOCATION=${1#*=} ;;
    --slice=*) SLICE=${1#*=} ;;
    --worker=*) WORKER=${1#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) usage ;;
    --) shift && break ;;
    *) fail "the option is '$1'; allowed are --cluster=, --zone=, --project=, --workload=, --tpu-type=, --num-slices=, --docker-image=, --base-docker-image=, --script-dir=, --max-restarts=, --env=KEY=VALUE, --xpk-flag=--FLAG, --location=, --slice=, --worker=, --dry-run and --help, and after -- the training flags" ;;
  esac
  shift
done

NAMES='of lower-case letters, digits and dashes that begins with a letter'
if [ "$ACTION" != image ]; then
  check '--cluster (or XPK_CLUSTER)' "$CLUSTER" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "a name of at most 40 characters, $NAMES"
  check '--zone (or XPK_ZONE)' "$ZONE" '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+' 'a zone such as us-central2-b'
  check '--project (or XPK_PROJECT)' "$PROJECT" '[a-z][-a-z0-9.:]*[a-z0-9]' 'the id of a Google Cloud project'
fi
# xpk deletes every workload of the cluster where none is named.
case $ACTION in
  create | logs | delete) check --workload "$WORKLOAD" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "a name of at most 40 characters, $NAMES" ;;
esac
[ "$ACTION" = create ] || [ $# -eq 0 ] ||
  fail "'$*' stands after -- but $ACTION passes nothing on; allowed with create"

# xpk VERB [flags], for this cluster.
workload() {
  run xpk workload "$1" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" "${@:2}" ${OTHERS[@]+"${OTHERS[@]}"}
}

image() {
  check --docker-image "$IMAGE" '[a-z0-9].*' 'the name to push the image to'
  # The TPU's device files belong to root.
  run docker build --file="$ROOT/launch/Containerfile" --platform=linux/amd64 \
    --build-arg=ACCELERATOR=tpu --build-arg=RUN_AS=0 --tag="$IMAGE" "$ROOT"
  run docker push "$IMAGE"
}

create() {
  check_tpu_type --tpu-type "$TYPE"
  check --num-slices "$SLICES" '[1-9][0-9]*' '1 or more'
  check --max-restarts "$RESTARTS" '[0-9]+' '0 or more'
  needs_training_flags "$@"
  # What lies in a pod is lost with it.
  check --workdir "$(training_flag --workdir "$@")" "$BUCKET|/.+" 'gs://BUCKET/RUN, or the path of a volume that is mounted in every pod'
  # The command becomes a line of a pod's specification, where $(...) would be replaced.
  case "$*" in
    *$'\n'* | *"\$("*) fail "a training flag in '$*' holds a line break or \$(, which a pod's command cannot; allowed is all else" ;;
  esac
  local flags=(--workload="$WORKLOAD" --tpu-type="$TYPE" --num-slices="$SLICES")
  if [ -n "$IMAGE" ] && [ -z "$BASE$DIR" ]; then
    flags+=(--docker-image="$IMAGE")
  elif [ -z "$IMAGE" ] && [ -n "$BASE" ] && [ -d "$DIR" ]; then
    flags+=(--base-docker-image="$BASE" --script-dir="$DIR")
  else
    fail "the image is --docker-image='$IMAGE' --base-docker-image='$BASE' --script-dir='$DIR'; allowed is the first alone, or the other two with an existing directory"
  fi
  # A process that loses the others ends with 1, which xpk takes for final, as 2, a refusal, is.
  flags+=(--max-restarts="$RESTARTS" --restart-on-exit-codes=1 --termination-grace-period-seconds=300)
  # Slices of one host each do not look like several processes from inside.
  local distributed=()
  [ "$SLICES" = 1 ] || distributed=(--distributed=on)
  # exec, so that the SIGTERM that xpk passes on reaches Python and not a shell.
  workload create "${flags[@]}" "${ENVIRONMENT[@]}" \
    --command="exec $(quoted python -m actfocus_jax.train ${distributed[@]+"${distributed[@]}"} "$@")"
}

logs() {
  check --slice "$SLICE" '[0-9]+' 'the number of one slice, 0 or more'
  check --worker "$WORKER" '[0-9]+' 'the number of one worker, 0 or more'
  # xpk names no logs; it has gcloud make the context of kubectl, named after the cluster's place.
  check '--location (or XPK_LOCATION)' "${LOCATION:=${ZONE%-*}}" '[a-z]+-[a-z]+[0-9]+(-[a-z0-9]+)?' 'a region or a zone'
  local jobset=jobset.sigs.k8s.io
  run kubectl logs --context="gke_${PROJECT}_${LOCATION}_$CLUSTER" --follow --tail=100 --all-containers \
    --selector="$jobset/jobset-name=$WORKLOAD,$jobset/job-index=$SLICE,batch.kubernetes.io/job-completion-index=$WORKER"
}

case $ACTION in
  image) needs_program docker ;;
  logs) needs_program kubectl ;;
  *) needs_program xpk ;;
esac
case $ACTION in
  image) image ;;
  create) create "$@" ;;
  list) workload list ;;
  logs) logs ;;
  delete) workload delete --workload="$WORKLOAD" ;;
esac
