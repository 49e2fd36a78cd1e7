"""Measures the worker on a GPU, in stages of at most eight minutes, and writes the report."""
