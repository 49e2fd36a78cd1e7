"""`python -m sfllm_gateway.grammar_process`: tries out grammars for one gateway, until it hangs up.

llguidance bounds most of what a grammar may cost, but not all: a chain of a thousand `$ref` overflows its
stack and a large `multipleOf` does not end. A worker would be lost with every request that it serves, so
only what was compiled here gets that far. The gateway keeps the time.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

from sfllm_gateway.grammar_jobs import GrammarJob, GrammarResult
from sfllm_gateway.job_loop import serve_jobs

STACK_BYTES = 2**20
"""An eighth of what threads of a worker commonly have: what does not overflow here does not there."""

MAX_COMPILED_BYTES = 2**18

END_OF_TEXT = "end of text"
_NO_TEXT = "no text follows it"
_TOO_MUCH = "it is too large or too deep"

_decoder = msgspec.json.Decoder(GrammarJob)
_encode = msgspec.json.Encoder().encode
_limits = LLParserLimits(verbose_errors=False)


class Vocabulary:
    """Every byte, an end of text, and a model's special tokens, in the form that llguidance asks for."""

    def __init__(self, special_tokens: Sequence[str], size: int) -> None:
        special = [name.encode() for name in (END_OF_TEXT, *special_tokens)]
        self.tokens = [bytes((byte,)) for byte in range(256)] + special
        self.tokens += [b""] * (size - len(self.tokens))
        self.eos_token_id = 256
        self.bos_token_id = None
        self.special_token_ids = list(range(256, 256 + len(special)))

    def __call__(self, text: bytes) -> list[int]:
        """Token ids of a text."""
        return list(text)


def try_out(job: GrammarJob) -> GrammarResult:
    """Write the grammar, compile it, and look at what may come first."""
    try:
        grammar = _WRITERS[job.kind](job)
    except ValueError as error:
        return GrammarResult("", str(error))
    if len(grammar.encode()) > MAX_COMPILED_BYTES:
        return GrammarResult("", _TOO_MUCH)
    vocabulary = Vocabulary(job.special_tokens, job.vocab_size)
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(vocabulary)), grammar, log_level=0, limits=_limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return GrammarResult("", _readable(matcher.get_error()))
    return GrammarResult(grammar)


def _of_json(job: GrammarJob) -> str:
    # A schema has a way to ask that what cannot be enforced is left out: not here.
    if job.whitespace:
        space = job.whitespace
        return LLMatcher.grammar_from_json_schema(job.text, {"whitespace_pattern": space}, {"lenient": False})
    return LLMatcher.grammar_from_json_schema(job.text, {"whitespace_flexible": False}, {"lenient": False})


def _of_regex(job: GrammarJob) -> str:
    return LLMatcher.grammar_from_regex(job.text)


def _of_choice(job: GrammarJob) -> str:
    # Lark's strings have JSON's escapes.
    texts = msgspec.json.decode(job.text, type=list[str])
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))


def _of_grammar(job: GrammarJob) -> str:
    if is_lark_syntax(job.text):
        return LLMatcher.grammar_from_lark(job.text)
    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(job.text))
    except Exception as error:  # for some mistakes it raises no class of its own
        raise ValueError(str(error)) from error


_WRITERS: dict[str, Callable[[GrammarJob], str]] = {
    "json": _of_json,
    "regex": _of_regex,
    "choice": _of_choice,
    "grammar": _of_grammar,
}


def _readable(error: str) -> str:
    """What llguidance says, without the form that the text was given on its way."""
    if error.startswith("NoExtensionBias"):
        return _NO_TEXT
    if error.startswith("panic:"):
        return _TOO_MUCH
    if found := re.search(r"regex parse error:.*^error: ([^\n]*)", error, re.DOTALL | re.MULTILINE):
        return f"bad regular expression: {found[1]}"
    return error.rpartition("(in regex): ")[2].partition("\n<")[0].strip()


def answer(body: bytes) -> bytes:
    """The encoded result of an encoded job, whatever is in it."""
    try:
        return _encode(try_out(_decoder.decode(body)))
    except Exception as error:  # noqa: BLE001 - out of memory, or what llguidance does not foresee
        return _encode(GrammarResult("", str(error) or type(error).__name__))


def main() -> None:
    """Answer jobs in a thread of known stack size."""
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=serve_jobs, args=(answer,))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
