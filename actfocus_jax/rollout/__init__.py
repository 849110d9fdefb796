"""Rollouts: episodes played by a sampled policy in slots with a KV cache."""
