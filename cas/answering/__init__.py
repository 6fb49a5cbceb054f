"""Answering: prompts, composed cartridges, retrieval and decoding."""
