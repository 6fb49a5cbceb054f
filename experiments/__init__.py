"""Experiments: one file per claim. Every run leaves a folder that ``python -m experiments.check`` can recompute."""
