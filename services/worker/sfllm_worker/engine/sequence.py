"""One sequence: its tokens, how much of it is in the KV cache, and where."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sfllm.messages import Sampling

if TYPE_CHECKING:  # an engine that makes its tokens up needs no numpy
    from sfllm_worker.structured.constraint import Constraint


@dataclass(eq=False)
class Sequence:
    """One choice of a request, from admission to its last token.

    `tokens` is prompt plus output. `computed` of them have their keys and values in the cache,
    in the blocks of `block_table`; the rest is what the next steps compute. `fork_choices`
    are further choices of the same request that branch off when the prompt is computed.
    `hashes` name the full blocks of tokens so far as they were needed. `cached_tokens` were found
    in the prefix cache at its first admission, None before it. `reported_prompt` prompt tokens have
    had their log probabilities reported, where those were asked for. A sequence whose output follows a
    grammar has its `constraint` before it runs; that has consumed all output tokens.

    Steps are launched ahead of what was read of them. `computed` counts what was launched, and
    `unread` tokens, which follow `tokens`, were chosen on the device by steps up to `last_step` that
    nobody has read yet. The sequence ends when it has `length_limit` tokens, if not before, and where
    `needs_its_tokens` its next token cannot be chosen before all others were read.
    Invariant: 0 <= computed < len(tokens) + unread, and block_table covers at least `computed` tokens.
    It is empty exactly while the sequence does not run.
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
    unread: int = 0
    last_step: int = 0
    length_limit: int = sys.maxsize
    needs_its_tokens: bool = False
    constraint: Constraint | None = None

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) + self.unread - self.computed

    @property
    def generated(self) -> int:
        """Output tokens so far, those of earlier attempts included."""
        return len(self.tokens) - self.prompt_count

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether something is still wanted of every prompt token, so that none may come from the cache."""
        if self.sampling.pooling:
            return self.sampling.pooling == "mean"
        return self.sampling.prompt_logprobs >= 0 and self.reported_prompt < self.prompt_count

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
            last_step=self.last_step,
            length_limit=self.length_limit,
            needs_its_tokens=self.needs_its_tokens,
            constraint=None if self.constraint is None else self.constraint.copy(),
        )
