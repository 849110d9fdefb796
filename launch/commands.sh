# shellcheck shell=bash
# Sourced by the other scripts: how they refuse, explain themselves, and run a
# command or, under --dry-run, print it.

# shellcheck disable=SC2034  # The scripts that source this file use it.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=

fail() {
  echo "error: $*" >&2
  exit 2
}

# The comment at the head of the script is its help.
usage() {
  awk 'NR > 1 && !/^#/ {exit} NR > 1 {sub(/^# ?/, ""); print}' "$0"
  exit 0
}

# Prints the arguments as one line that any POSIX shell reads back as they are.
quoted() {
  local word rest space=
  for word in "$@"; do
    printf '%s' "$space"
    space=' '
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*)
        rest=$word
        printf "'"
        while [[ $rest == *\'* ]]; do
          printf "%s'\\\\''" "${rest%%\'*}"
          rest=${rest#*\'}
        done
        printf "%s'" "$rest"
        ;;
      *) printf '%s' "$word" ;;
    esac
  done
}

run() {
  if [ -n "$DRY_RUN" ]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# For a script's last command: signals sent to the script then reach it.
run_last() {
  [ -n "$DRY_RUN" ] || exec "$@"
  run "$@"
}

# check FIELD VALUE PATTERN ALLOWED
check() {
  [[ $2 =~ ^($3)$ ]] || fail "$1 is '$2'; allowed is $4"
}

needs_program() {
  [ -n "$DRY_RUN" ] || command -v "$1" >/dev/null ||
    fail "the program '$1' is not on PATH; install it, or give --dry-run to see the commands"
}

needs_training_flags() {
  local flag
  for flag in --config --workdir; do
    case " $*" in
      *" $flag="*) ;;
      *) fail "$flag is missing among the training flags '$*'; needed are --config=configs/NAME.py and --workdir=DIR" ;;
    esac
  done
}

# training_flag NAME FLAGS...: the last value of a flag among them.
training_flag() {
  local flag value=
  for flag in "${@:2}"; do
    case $flag in "$1"=*) value=${flag#*=} ;; esac
  done
  printf '%s' "$value"
}

# shellcheck disable=SC2034  # The scripts that source this file use it.
BUCKET='gs://[^/]+/+[^/].*'

# What is an address and no bucket would make a local folder of that name.
check_workdir_scheme() {
  [[ ! $1 =~ ^[A-Za-z][A-Za-z0-9+.-]*:/ || $1 =~ ^$BUCKET ]] ||
    fail "--workdir is '$1'; allowed is a directory, or gs://BUCKET/RUN"
}

# check_env KEY=VALUE
check_env() {
  check --env "$1" '[A-Za-z_][A-Za-z0-9_]*=.*' 'KEY=VALUE'
}

# check_tpu_type FIELD TYPE: the chips of v5litepod and v6e are known, of v5p that its cores come
# in cubes of 8, of others it is the form. v5e is its name everywhere but here.
check_tpu_type() {
  check "$1" "$2" '[a-z0-9]+-[0-9x-]+' 'a type such as v5litepod-16'
  case $2 in
    v5e-*) fail "$1 is '$2'; allowed is v5litepod-${2#*-}, the name of that v5e" ;;
    v5litepod-* | v6e-*)
      [[ ${2#*-} =~ ^(1|4|8|16|32|64|128|256)$ ]] ||
        fail "$1 is '$2'; allowed is ${2%%-*}-N with N one of 1, 4, 8, 16, 32, 64, 128, 256"
      ;;
    v5p-*)
      [[ ${2#*-} =~ ^[1-9][0-9]*$ && $((${2#*-} % 8)) = 0 ]] ||
        fail "$1 is '$2'; allowed is v5p-N with N, two cores a chip, a multiple of 8"
      ;;
  esac
}
