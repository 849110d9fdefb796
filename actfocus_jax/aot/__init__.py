"""Memory, work and least time of a run on an absent TPU slice."""
