"""Which of several schedulers gets a request: what of it `sfllm.rendezvous` goes by. Pure."""

from __future__ import annotations

from sfllm import rendezvous
from sfllm.prefixes import CHUNK_TOKENS, prefix_names
from sfllm_gateway.stream import Request


def routing_key(request: Request) -> bytes:
    """What is hashed: the first prefix of the prompt or, of a prompt that has none, the request's id."""
    beginning = memoryview(request.prompt[: CHUNK_TOKENS + 1])
    return rendezvous.routing_key(prefix_names(beginning, request.cache_salt), request.request_id)
