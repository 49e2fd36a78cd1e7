"""Breaks the real processes on purpose and checks every token that clients get."""
