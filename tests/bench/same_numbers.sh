#!/usr/bin/env bash
# Exits 0 only if two commits compute the same numbers, digit for digit.
#
#   tests/bench/same_numbers.sh OLD_COMMIT [NEW_COMMIT] [--only=NAME,...]
#
# -h prints what is run and compared. PY names the interpreter of both sides.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PY=${PY:-$here/../../.venv/bin/python}
exec "$PY" "$here/same_numbers.py" "$@"
