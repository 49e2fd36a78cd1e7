"""The scheduler's decisions, pure: no socket, clock, thread or randomness of its own."""
