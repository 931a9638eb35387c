"""Checkpoints on disk: found and checked on the way in, written and published in one step on the way out."""
