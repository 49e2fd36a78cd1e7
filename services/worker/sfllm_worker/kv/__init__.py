"""The paged KV cache: its tensors and the bookkeeping of its blocks."""
