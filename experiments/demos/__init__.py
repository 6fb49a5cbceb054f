"""Whole runs on small collections: the demos."""
