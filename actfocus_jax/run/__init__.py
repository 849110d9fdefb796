"""What keeps a run alive: checkpoints, metrics, the display, interruption."""
