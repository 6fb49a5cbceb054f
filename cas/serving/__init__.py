"""Serving: an engine that decodes many requests together, and an HTTP server in front of it."""
