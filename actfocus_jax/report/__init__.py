"""What a run leaves to look at: intervals, curves, trajectories, a summary."""
