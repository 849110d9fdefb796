"""Shared parts of the commands: flags, paths, processes and the dry run."""
