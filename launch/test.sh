#!/usr/bin/env bash
# The test suite, in the same environment as the quick start.
#
#   bash launch/test.sh              # without those marked slow
#   bash launch/test.sh -m slow      # only those
#   bash launch/test.sh -m ''        # all
#
# Arguments go to pytest; a path or a name, say, chooses some of them.
# Two processes share the files of tests; -n 0 keeps to one.
set -euo pipefail

# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
