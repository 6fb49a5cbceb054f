"""Evaluation: metrics and intervals, arms, recorded runs."""
