"""The stateless OpenAI-compatible HTTP gateway."""
