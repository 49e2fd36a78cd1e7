"""Choosing the next token from logits, with randomness keyed by request and position."""
