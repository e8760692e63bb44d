"""Merges of synthetic checkpoints, timed beside mergekit, plain torch and a bare copy of the same bytes."""
