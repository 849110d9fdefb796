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
