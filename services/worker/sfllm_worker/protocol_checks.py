"""Why a granted request cannot run here: what a gateway should have refused must not break the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sfllm.messages import GrantedRequest, Sampling
from sfllm_worker.engine.interface import EngineInterface


def problem_of(
    granted: GrantedRequest, token_lists: Sequence[Sequence[int]], engine: EngineInterface, vocab_size: int
) -> str | None:
    """A sentence for the client, or None when the request can run. `token_lists` are its sequences."""
    sampling = granted.sampling
    for tokens in token_lists:
        if not engine.fits(len(tokens)):
            return f"{len(tokens)} tokens do not fit the model's context"
        if max(tokens) >= vocab_size:
            return f"token id {max(tokens)} is not in the vocabulary of {vocab_size}"
    if any(not 0 <= token < vocab_size for token in _named_tokens(sampling)):
        return "a token id of the sampling parameters is not in the vocabulary"
    if sampling.grammar and not engine.follows_grammars:
        return "this worker makes its tokens up and cannot follow a grammar"
    if sampling.max_tokens < 1 or any(count >= sampling.max_tokens for count in granted.generated_counts):
        return "no token is left to generate"
    return None


def _named_tokens(sampling: Sampling) -> Iterator[int]:
    """Every token id that the sampling parameters name."""
    yield from sampling.stop_token_ids
    yield from sampling.allowed_token_ids
    yield from (token for token, _ in sampling.logit_bias)
    yield from (token for word in sampling.bad_words for token in word)
