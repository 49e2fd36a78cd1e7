"""OpenAI's API: request structs, their validation, and the bytes of answers."""
