"""Sequences that wait for their grammar, outside of the planner, which never waits."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import NamedTuple

from llguidance import LLMatcher

from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.structured.grammars import GrammarError, Grammars, begin


class Compiled(NamedTuple):
    """Sequences that have their constraint now; those that cannot, and what their clients are told."""

    ready: list[Sequence]
    refused: list[tuple[Sequence, str]]


class Compiling:
    """Owner of the waiting sequences, which leave in the order in which their grammars are ready."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._waiting: dict[Sequence, Future[LLMatcher]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Begin to compile its grammar, if nobody has."""
        self._waiting[sequence] = self._grammars.compile(sequence.sampling.grammar)

    def remove(self, sequence: Sequence) -> bool:
        """Forget a sequence; whether it was here."""
        future = self._waiting.pop(sequence, None)
        if future is not None and future not in self._waiting.values():
            self._grammars.abandon(future)
        return future is not None

    def wait(self, seconds: float) -> None:
        """Until a grammar is ready, at most so long."""
        wait(self._waiting.values(), seconds, FIRST_COMPLETED)

    def take(self) -> Compiled:
        """Those whose grammar is ready."""
        compiled = Compiled([], [])
        for sequence, future in [item for item in self._waiting.items() if item[1].done()]:
            del self._waiting[sequence]
            try:
                sequence.constraint = begin(future.result(), sequence.tokens[sequence.prompt_count :])
            except GrammarError as error:
                compiled.refused.append((sequence, str(error)))
            else:
                compiled.ready.append(sequence)
        return compiled
