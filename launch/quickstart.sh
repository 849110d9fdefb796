#!/usr/bin/env bash
# From nothing to an agent that has learned FrozenLake, on two CPU cores.
#
#   bash launch/quickstart.sh [flags of actfocus_jax.train]
#
# The same command again goes on where the last one stopped.
set -euo pipefail

# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec "$VENV/bin/python" -m actfocus_jax.train \
  --config=configs/quickstart.py --workdir=runs/quickstart "$@"
