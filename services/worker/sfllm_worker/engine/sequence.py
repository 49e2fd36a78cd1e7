"""One sequence: its tokens, how much of it is in the KV cache, and where."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from sfllm.messages import Sampling


@dataclass(eq=False)
class Sequence:
    """One choice of a request, from admission to its last token.

    `tokens` is prompt plus output. `computed` of them have their keys and values in the cache,
    in the blocks of `block_table`; the rest is what the next steps compute. `fork_choices`
    are further choices of the same request that branch off when the prompt is computed.
    `hashes` name the full blocks of tokens so far as they were needed. `cached_tokens` were found
    in the prefix cache at its first admission, None before it. `reported_prompt` prompt tokens have
    had their log probabilities reported, where those were asked for.
    Invariant: 0 <= computed < len(tokens), and block_table covers at least `computed` tokens.
    """

    key: Hashable
    choice: int
    tokens: list[int]
    prompt_count: int
    sampling: Sampling
    fork_choices: tuple[int, ...] = ()
    computed: int = 0
    block_table: list[int] = field(default_factory=list)
    cache_salt: str = ""
    hashes: list[bytes] = field(default_factory=list)
    cached_tokens: int | None = None
    reported_prompt: int = 1

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Output tokens so far, those of earlier attempts included."""
        return len(self.tokens) - self.prompt_count

    @property
    def slots(self) -> int:
        """How many sequences this one is or will become."""
        return 1 + len(self.fork_choices)

    def fork(self, choice: int) -> Sequence:
        """A sequence with the same tokens and blocks; the caller counts the shared references."""
        return Sequence(
            key=self.key,
            choice=choice,
            tokens=list(self.tokens),
            prompt_count=self.prompt_count,
            sampling=self.sampling,
            computed=self.computed,
            block_table=list(self.block_table),
            cache_salt=self.cache_salt,
            hashes=list(self.hashes),
            cached_tokens=self.cached_tokens,
            reported_prompt=self.prompt_count,
        )
