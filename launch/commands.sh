# shellcheck shell=bash
# What the launchers share: help, refusals, and running or printing a command.
# Sourced. It also works in bash 3.2, the version on macOS.

# shellcheck disable=SC2034  # Used by the scripts that source this file.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=
# shellcheck disable=SC2034
BUCKET='gs://[^/]+/+[^/].*'

fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints the comment at the head of the script.
usage() {
  awk 'NR > 1 && (!/^#/ || /^#SBATCH/) {exit} NR > 1 {sub(/^# ?/, ""); print}' "$0"
  exit 0
}

# Prints the arguments as one line that any POSIX shell splits into the same arguments.
quoted() {
  local word space='' quote="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$quote}'" ;;
    esac
    printf '%s%s' "$space" "$word"
    space=' '
  done
}

# Runs a command, or prints it under --dry-run.
run() {
  if [ -n "$DRY_RUN" ]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# check FIELD VALUE PATTERN ALLOWED
check() {
  [[ $2 =~ ^($3)$ ]] || fail "$1 is '$2'; allowed is $4"
}

check_env() {
  check --env "$1" '[A-Za-z_][A-Za-z0-9_]*=.*' KEY=VALUE
}

needs_program() {
  [ -n "$DRY_RUN" ] || command -v "$1" >/dev/null ||
    fail "the program '$1' is not on PATH; install it, or give --dry-run to see the commands"
}

# training_flag NAME FLAGS...: prints the last value of a training flag.
training_flag() {
  local flag value=
  for flag in "${@:2}"; do
    case $flag in "$1"=*) value=${flag#*=} ;; esac
  done
  printf '%s' "$value"
}

needs_training_flags() {
  local flag
  for flag in --config --workdir; do
    [ -n "$(training_flag "$flag" "$@")" ] ||
      fail "$flag is missing among the training flags '$*'; needed are --config=configs/NAME.py and --workdir=DIR"
  done
}
