"""Where the model and the environment meet: chat, sampling, rollouts."""
