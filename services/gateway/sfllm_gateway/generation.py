"""What an endpoint asks a session to do, and how it writes down what came of it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from sfllm.errors import ServiceError
from sfllm.messages import Sampling
from sfllm_gateway.logprobs import TokenReport
from sfllm_gateway.models import LoadedModel
from sfllm_gateway.parsing.deltas import OutputParser

Prompts: TypeAlias = "list[array[int]]"
"""Token ids (array code "I") of each prompt."""


class Generation(NamedTuple):
    """One HTTP request's work: `n` choices for each prompt, each prompt with its sampling.

    `echo` are the texts of the prompts where answers begin with them. `logprobs` and `prompt_logprobs` are
    how many likeliest tokens the client wants with each token of the answer (an echoed prompt's included) and
    of the prompt, None for no report; the samplings ask for as many as either needs. `discards` drops
    what is generated: only the prompt is answered. `tenant` is who asks: see `tenant.py`. `parsers` makes,
    for a choice by a name of its own, what tells its reasoning and tool calls from its content; None where
    all is content. For that, the special tokens `shown_tokens` are not skipped.
    `seeded` says that the client chose the samplings' seeds, which are drawn otherwise.
    """

    model: LoadedModel
    prompts: Prompts
    n: int
    samplings: Sequence[Sampling]
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    stream: bool = False
    cache_salt: str = ""
    echo: Sequence[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    discards: bool = False
    tenant: str = ""
    parsers: Callable[[str], OutputParser] | None = None
    shown_tokens: frozenset[str] = frozenset()
    seeded: bool = False

    @property
    def needs_worker(self) -> bool:
        """Whether the answer holds anything that only a worker knows."""
        return not self.discards or self.logprobs is not None or self.prompt_logprobs is not None


class Usage(NamedTuple):
    """Tokens of a request, or of one choice of it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Update(NamedTuple):
    """News of one choice: further text and its token ids, and with the last one how it ended.

    `matched` is the stop string or stop token that ended it; `usage` counts this choice so far.
    `logprobs` are of the tokens behind this text, the echoed prompt's first; None if not asked for.
    `prompt_logprobs` and the prompt's `embedding`, not normalized, come with the last update of a choice.
    """

    choice: int
    text: str
    ids: Sequence[int]
    usage: Usage
    finish_reason: str | None = None
    matched: str | int | None = None
    logprobs: Sequence[TokenReport] | None = None
    prompt_logprobs: Sequence[TokenReport] | None = None
    embedding: Sequence[float] = ()


class Answer(Protocol):
    """Writes the answer of one endpoint for one request, the end of its stream included."""

    def first(self, choices: int) -> bytes:
        """What a stream begins with, before any text."""

    def event(self, update: Update) -> bytes:
        """One event of a stream."""

    def last(self, usage: Usage) -> bytes:
        """What follows the last choice's end, with the end mark if the endpoint's streams have one."""

    def failed(self, error: ServiceError) -> bytes:
        """What ends a stream that began and cannot go on, with the end mark likewise."""

    def whole(self, updates: Sequence[Update], usage: Usage) -> bytes:
        """The body of an answer that is not streamed, one complete update a choice."""
