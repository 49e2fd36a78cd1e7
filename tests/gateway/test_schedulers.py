"""What the choice between schedulers goes by: the beginning of a prompt, or the request itself."""

from __future__ import annotations

from array import array

from sfllm.messages import Sampling
from sfllm.prefixes import CHUNK_TOKENS
from sfllm_gateway.schedulers import routing_key
from sfllm_gateway.stream import Request


def request(tokens: int, request_id: str = "r", salt: str = "", tail: int = 0) -> Request:
    prompt = array("I", [*range(tokens), tail])
    return Request(request_id, "m", prompt, 1, Sampling(max_tokens=1, seed=1), cache_salt=salt)


def test_prompts_that_begin_alike_have_one_key_and_salts_part_them() -> None:
    long = 2 * CHUNK_TOKENS
    assert routing_key(request(long, "a", tail=1)) == routing_key(request(long, "b", tail=2))
    assert routing_key(request(long, salt="x")) != routing_key(request(long))
    assert routing_key(request(CHUNK_TOKENS, tail=1)) == routing_key(request(CHUNK_TOKENS, tail=2))


def test_prompts_that_are_too_short_to_be_cached_are_spread_by_their_ids() -> None:
    assert routing_key(request(CHUNK_TOKENS - 1, "a")) != routing_key(request(CHUNK_TOKENS - 1, "b"))
