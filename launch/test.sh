#!/usr/bin/env bash
# The test suite, in the same environment as the quick start.
#
#   bash launch/test.sh [pytest arguments]
set -euo pipefail

# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec "$VENV/bin/python" -m pytest "$@"
