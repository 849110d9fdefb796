# shellcheck shell=bash
# Sourced by the other scripts: makes .venv and installs requirements.txt.
#
#   PYTHON   the interpreter that .venv is made with (default python3); 3.11 or newer
#
# A second run with the same requirements and interpreter installs nothing.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$ROOT/.venv"
# Without PYTHON an environment that is there keeps its interpreter.
if [ -z "${PYTHON:-}" ] && [ -x "$VENV/bin/python" ] && [ -f "$VENV/.installed" ]; then
  PYTHON="$VENV/bin/python"
fi
PYTHON=${PYTHON:-python3}

fail() {
  echo "error: $*" >&2
  exit 2
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "PYTHON is '$PYTHON', which is no Python of 3.11 or newer; set PYTHON, e.g. PYTHON=python3.12"

wanted="$("$PYTHON" -c 'import sys; print(sys.version)') $(cksum <"$ROOT/requirements.txt")"
stamp="$VENV/.installed"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  echo "Installing requirements.txt into .venv; this happens once and takes a few minutes."
  rm -f "$stamp"
  "$PYTHON" -m venv --clear "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    --requirement "$ROOT/requirements.txt"
  echo "$wanted" >"$stamp"
fi

cd "$ROOT" || exit
