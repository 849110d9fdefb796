"""Report of a run: summary, curves, trajectories, intervals, comparison."""
