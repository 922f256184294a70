"""Checkpoints of a run in training: written beside it, loaded on any number of ranks."""
