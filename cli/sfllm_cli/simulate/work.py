"""What a modelled worker works on, and what it does in a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sfllm.prefixes import CHUNK_TOKENS

Key = tuple[int, int]
"""Gateway and handle of a request."""


class Work:
    """One request on a worker. `prompt` counts the tokens to compute first, those of lost attempts included.

    `names` are those of its beginnings, of its answer too. `left` is what of the prompt is not computed,
    `outputs` how many tokens are to come, `got` how many came before it last began to decode, `context`
    what it has in the cache, `shared` how many of its names it refers to there. `ends_at` is the number
    of the worker's step that gives its last token, -1 while it does not decode; `turn` its place in the
    order of admission, 0 before the first. `cached` tokens were found at the first admission. The engine
    does not know the times; `worker.py` notes them.
    """

    __slots__ = (
        "admitted_at",
        "attempt",
        "cached",
        "context",
        "ends_at",
        "first_at",
        "got",
        "granted_at",
        "key",
        "left",
        "names",
        "outputs",
        "prompt",
        "prompt_tokens",
        "queue_seconds",
        "shared",
        "turn",
    )

    def __init__(
        self, key: Key, attempt: int, prompt: int, outputs: int, names: Sequence[int] = (), so_far: int = 0
    ) -> None:
        self.key = key
        self.attempt = attempt
        self.prompt_tokens = prompt
        self.prompt = self.left = prompt + so_far
        self.outputs = outputs
        self.names = names
        self.context = self.shared = self.got = self.turn = self.cached = 0
        self.ends_at = -1
        self.granted_at = self.queue_seconds = self.admitted_at = self.first_at = 0.0

    @property
    def begun(self) -> bool:
        """Whether something was computed of it here."""
        return self.turn > 0

    @property
    def prompt_names(self) -> Sequence[int]:
        """Names of beginnings that its prefill computes: its answer's are not among them."""
        return self.names[: self.prompt // CHUNK_TOKENS]

    @property
    def usable(self) -> Sequence[int]:
        """Names of beginnings that it can take from the cache: of all tokens but the last at most."""
        return self.names[: (self.prompt - 1) // CHUNK_TOKENS]


class Plan(NamedTuple):
    """`steps` equal steps of `rows` decodes, or one step with `chunks` of prefill beside them."""

    steps: int
    rows: int
    chunks: list[tuple[Work, int]]
    admitted: list[Work]
    seconds: float
