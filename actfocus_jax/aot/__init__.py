"""What a run would need and take on a TPU slice that is not there."""
