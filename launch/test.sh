#!/usr/bin/env bash
# Runs the tests in the environment of the quick start.
#
#   bash launch/test.sh              # all but those marked slow
#   bash launch/test.sh -m slow      # only those
#   bash launch/test.sh -m ''        # all
#
# Arguments go to pytest. Two processes share the test files; -n 0 uses one.
set -euo pipefail

# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
