"""The sfllm command line: serve, chat, bench and pull."""
