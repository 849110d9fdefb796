"""Memory, work and least time of a run on a TPU slice that is not there."""
