"""Files of a run: checkpoints, metrics, locks; progress and interruption."""
