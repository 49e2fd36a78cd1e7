"""Continuous batching: which tokens run in the next step, running them, and what came of it."""
