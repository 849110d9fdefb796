"""Warm start: scripted players, demonstrations and supervised training."""
