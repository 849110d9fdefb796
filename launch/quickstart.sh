#!/usr/bin/env bash
# Installs everything and trains a small agent on FrozenLake, on two CPU cores.
#
#   bash launch/quickstart.sh [flags of actfocus_jax.train]
#
# The same command given again continues the run.
set -euo pipefail

# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec "$VENV/bin/python" -m actfocus_jax.train \
  --config=configs/quickstart.py --workdir=runs/quickstart "$@"
