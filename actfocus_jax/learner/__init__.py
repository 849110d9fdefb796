"""Learner: the train state, the train step, the self-check."""
