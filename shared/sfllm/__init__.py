"""What every sfllm service shares: messages, wire codec, sockets, settings, errors, metrics and logs."""
