"""Measures sfllm beside the servers that a user would pick instead: `python -m bench.peers`."""
