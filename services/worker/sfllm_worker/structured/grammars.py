"""Compiling grammars in threads, so that no step waits for it, and keeping those that come again."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from sfllm_worker.structured.constraint import WORD_BITS, Constraint, mask_words
from sfllm_worker.structured.figures import GrammarFigures

MAX_KEPT = 128
"""Compiled grammars that are kept. Each holds kilobytes to a few megabytes, by what was asked of it."""

THREADS = max(1, min(4, (os.cpu_count() or 1) - 1))

MAX_LEXER_STATES = 50_000
"""Of one grammar, a kilobyte or two each: what a hostile one may take. Others need some hundreds."""


class GrammarError(ValueError):
    """A grammar that cannot be compiled; what it says is for the client."""


class Grammars:
    """Owner of the compiled grammars of one model, the least recently used of which are forgotten.

    llguidance drops Python's lock while it compiles. The tokenizer (`tokenizer.json`) is read with the first
    grammar, so that a worker that is never asked for one starts without it.
    """

    def __init__(self, tokenizer: bytes, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_json = tokenizer.decode()
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids) or None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._tokenizer: Future[LLTokenizer] | None = None
        self._kept: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self.figures = GrammarFigures()

    def compile(self, grammar: str) -> Future[LLMatcher]:
        """The matcher at the beginning of a text, which must be copied; or raises `GrammarError` there."""
        found = self._kept.get(grammar)
        self.figures.asked += 1
        self.figures.found += found is not None
        if found is None:
            if self._tokenizer is None:
                self._tokenizer = self._threads.submit(self._read_tokenizer)
            found = self._kept[grammar] = self._threads.submit(self._compile, self._tokenizer, grammar)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        return found

    def abandon(self, future: Future[LLMatcher]) -> None:
        """Nobody waits any more for what `compile` gave: if it has not begun, it need not."""
        if future.cancel():
            for grammar in [each for each, kept in self._kept.items() if kept is future]:
                del self._kept[grammar]

    def close(self) -> None:
        """Compile nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read_tokenizer(self) -> LLTokenizer:
        # Rows of masks are whole words; what is beyond the vocabulary is cut off where they are used.
        size = mask_words(self._vocab_size) * WORD_BITS
        return LLTokenizer(self._tokenizer_json, n_vocab=size, eos_token=self._eos_token_ids)

    def _compile(self, tokenizer: Future[LLTokenizer], grammar: str) -> LLMatcher:
        # The task that reads the tokenizer was submitted before, so a thread has it already.
        try:
            vocabulary = tokenizer.result()
        except Exception as error:
            raise GrammarError(f"the model's tokenizer cannot be followed by a grammar: {error}") from error
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        began = time.monotonic()
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        self.figures.compile_seconds.append(time.monotonic() - began)
        if matcher.is_error():
            raise GrammarError(matcher.get_error().strip())
        return matcher


def begin(matcher: LLMatcher, generated: Sequence[int]) -> Constraint:
    """The constraint of a text of which so many tokens were generated before. Raises `GrammarError`."""
    constraint = Constraint(matcher.deep_copy())
    if generated and not constraint.consume(generated):
        raise GrammarError("the text so far does not follow the grammar")
    return constraint
