"""Compiles every GPU kernel ahead of time, without a GPU, and compares what each needs with a table."""
