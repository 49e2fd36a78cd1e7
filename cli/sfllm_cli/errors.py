"""What a command tells its user when it cannot go on."""

from __future__ import annotations


class CommandError(Exception):
    """A failure in words for the user: what went wrong and what to do next."""
