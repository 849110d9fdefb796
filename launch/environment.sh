# shellcheck shell=bash
# Makes .venv and installs requirements.txt; the other scripts source it.
#
#   PYTHON        the interpreter that .venv is made with (default python3); 3.11 or newer
#   ACCELERATOR   the build of JAX to install: cpu (default), cuda12, cuda13 or tpu
#
#   ACCELERATOR=cuda12 bash launch/environment.sh
#
# A second run with the same requirements, interpreter and accelerator installs nothing.
set -euo pipefail

# shellcheck source=launch/commands.sh
. "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

# When sourced, the arguments belong to the other script.
executed=
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  executed=1
  case ${1:-} in
    '') ;;
    -h | --help | help) usage ;;
    *) fail "the argument is '$1'; allowed are none, and the variables PYTHON and ACCELERATOR before the command" ;;
  esac
fi

VENV="$ROOT/.venv"
stamp="$VENV/.installed"
# An existing .venv keeps its interpreter and accelerator unless the caller names others.
if [ -x "$VENV/bin/python" ] && [ -f "$stamp" ]; then
  PYTHON=${PYTHON:-$VENV/bin/python}
  ACCELERATOR=${ACCELERATOR:-$(cat "$VENV/.accelerator" 2>/dev/null || echo cpu)}
fi
PYTHON=${PYTHON:-python3} ACCELERATOR=${ACCELERATOR:-cpu}
check ACCELERATOR "$ACCELERATOR" 'cpu|cuda12|cuda13|tpu' 'cpu, cuda12, cuda13 or tpu'
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "PYTHON is '$PYTHON', which is not a Python of 3.11 or newer; set PYTHON, e.g. PYTHON=python3.12"

wanted="$("$PYTHON" -c 'import sys; print(sys.version)') $(cksum <"$ROOT/requirements.txt")"
packages=(--requirement "$ROOT/requirements.txt")
if [ "$ACCELERATOR" != cpu ]; then
  wanted="$wanted $ACCELERATOR"
  packages+=("jax[$ACCELERATOR]")
fi
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  echo "Installing requirements.txt for $ACCELERATOR into .venv; this happens once and takes a few minutes."
  rm -f "$stamp"
  "$PYTHON" -m venv --clear "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
  echo "$ACCELERATOR" >"$VENV/.accelerator"
  echo "$wanted" >"$stamp"
fi

cd "$ROOT" || exit
[ -z "$executed" ] || echo ".venv has JAX for $ACCELERATOR"
