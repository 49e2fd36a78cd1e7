"""The decoder: configuration, layers, rotary embedding and attention over a paged KV cache."""
