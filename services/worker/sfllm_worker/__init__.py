"""The worker: runs the model with continuous batching over a paged KV cache."""
