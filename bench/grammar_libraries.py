"""Which library computes the masks of structured output fastest.

`python bench/grammar_libraries.py` walks through documents of several schemas with the default model's
tokenizer, and prints what llguidance and, where it is installed, xgrammar take to compile each schema and to
compute each token's mask: medians over rounds in turns. On one thread, as masks of a step are computed;
xgrammar keeps no compiled schemas here. It is no dependency: `pip install xgrammar` where it may be.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from tokenizers import Tokenizer

from sfllm.model_files import DEFAULT_MODEL, resolve_model
from sfllm_worker.load import LoadedModel, load_model

TOKENIZER = "tokenizer.json"


class Case(NamedTuple):
    """A schema and a document that it allows."""

    name: str
    schema: dict[str, Any]
    document: Any


def _object(properties: dict[str, Any], optional: bool = False) -> dict[str, Any]:
    required = [] if optional else list(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _tool(number: int) -> dict[str, Any]:
    arguments = _object({"query": {"type": "string"}, f"limit_{number}": {"type": "integer"}})
    return _object({"name": {"const": f"tool_{number}"}, "arguments": arguments})


def _tree(depth: int) -> dict[str, Any]:
    return {"value": depth, "children": [_tree(depth - 1)] * 2 if depth else []}


TEXT = {"type": "string"}
WORDS = "A quick brown fox jumps over the lazy dog, while seven wizards box."

CASES = (
    Case("flat", _object({"name": TEXT, "age": {"type": "integer"}}), {"name": WORDS, "age": 41}),
    Case(
        "list of objects",
        _object(
            {
                "items": {
                    "type": "array",
                    "items": _object(
                        {
                            "id": {"type": "integer", "minimum": 0, "maximum": 999},
                            "note": {"type": "string", "maxLength": 80},
                            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
                        }
                    ),
                }
            }
        ),
        {"items": [{"id": n, "note": WORDS, "tags": ["red", "blue"]} for n in range(8)]},
    ),
    Case(
        "patterns and formats",
        _object(
            {
                "mail": {"type": "string", "format": "email"},
                "when": {"type": "string", "format": "date-time"},
                "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4,8}$"},
            }
        ),
        {"mail": "ada@example.com", "when": "2026-05-04T03:02:01Z", "code": "ABC-12345"},
    ),
    Case(
        "recursive",
        {
            "$defs": {
                "node": _object(
                    {
                        "value": {"type": "integer"},
                        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                    }
                )
            },
            "$ref": "#/$defs/node",
        },
        _tree(3),
    ),
    Case(
        "one of 20 tools",
        {"anyOf": [_tool(number) for number in range(20)]},
        {"name": "tool_17", "arguments": {"query": WORDS, "limit_17": 5}},
    ),
    Case(
        "200 optional fields",
        _object({f"field_{number:03}": TEXT for number in range(200)}, optional=True),
        {f"field_{number:03}": "value" for number in range(0, 200, 10)},
    ),
    Case("any object", {"type": "object"}, {"a": [1, 2.5, None, True, {"b": WORDS}], "c": {"d": {}}}),
)


class Walker(Protocol):
    """One document's way through a compiled schema."""

    def mask(self) -> None:
        """Compute the mask of the next token."""

    def accept(self, token: int) -> bool:
        """Go on; False when the schema does not allow it."""


class Guidance:
    """llguidance, as the worker calls it."""

    name = "llguidance"

    def __init__(self, model: LoadedModel) -> None:
        text = model.assets[TOKENIZER].decode()
        self._tokenizer = LLTokenizer(
            text, n_vocab=model.config.vocab_size, eos_token=list(model.eos_token_ids)
        )
        self._mask = allocate_token_bitmask(1, model.config.vocab_size)

    def compile(self, schema: dict[str, Any]) -> Callable[[], Walker]:
        """What makes walkers."""
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_json_schema(schema), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return lambda: _GuidanceWalker(matcher.deep_copy(), self._mask)


class _GuidanceWalker:
    def __init__(self, matcher: LLMatcher, mask: np.typing.NDArray[np.int32]) -> None:
        self._matcher, self._mask = matcher, mask

    def mask(self) -> None:
        fill_next_token_bitmask(self._matcher, self._mask)

    def accept(self, token: int) -> bool:
        return bool(self._matcher.consume_token(token))


class XGrammar:
    """xgrammar, with the defaults of its own documentation but for one thread and no cache."""

    name = "xgrammar"

    def __init__(self, model: LoadedModel) -> None:
        self._library = xgrammar = importlib.import_module(self.name)
        vocabulary = Tokenizer.from_str(model.assets[TOKENIZER].decode()).get_vocab()
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        info = xgrammar.TokenizerInfo(
            words,
            vocab_type=xgrammar.VocabType.BYTE_LEVEL,
            vocab_size=model.config.vocab_size,
            stop_token_ids=list(model.eos_token_ids),
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._mask = xgrammar.allocate_token_bitmask(1, model.config.vocab_size)

    def compile(self, schema: dict[str, Any]) -> Callable[[], Walker]:
        """What makes walkers."""
        compiled = self._compiler.compile_json_schema(json.dumps(schema))
        return lambda: _XGrammarWalker(self._library.GrammarMatcher(compiled), self._mask)


class _XGrammarWalker:
    def __init__(self, matcher: Any, mask: torch.Tensor) -> None:
        self._matcher, self._mask = matcher, mask

    def mask(self) -> None:
        self._matcher.fill_next_token_bitmask(self._mask)

    def accept(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))


class Walk(NamedTuple):
    """Seconds of compiling, of each mask, and of accepting each token."""

    compile_seconds: float
    masks: list[float]
    accepts: list[float]


def walk(library: Guidance | XGrammar, case: Case, tokens: list[int]) -> tuple[Walk, Walk]:
    """The first walk after compiling, and one more with what the library has learned."""
    started = time.perf_counter()
    make = library.compile(case.schema)
    compile_seconds = time.perf_counter() - started
    first, again = (Walk(compile_seconds, *_times(make(), tokens)) for _ in range(2))
    return first, again


def _times(walker: Walker, tokens: list[int]) -> tuple[list[float], list[float]]:
    masks, accepts = [], []
    for token in tokens:
        started = time.perf_counter()
        walker.mask()
        masked = time.perf_counter()
        assert walker.accept(token), "the document does not follow its schema"
        masks.append(masked - started)
        accepts.append(time.perf_counter() - masked)
    return masks, accepts


HEADER = (
    "| schema | tokens | library | compile ms | mask us, mean (largest): first walk | again | accept us |"
)


def compare_libraries(rounds: int) -> None:
    """Print the table."""
    model = load_model(resolve_model(DEFAULT_MODEL), dtype="float32")
    tokenizer = Tokenizer.from_str(model.assets[TOKENIZER].decode())
    kinds: list[type[Guidance | XGrammar]] = [
        Guidance,
        *([XGrammar] if importlib.util.find_spec("xgrammar") else []),
    ]
    libraries: list[Guidance | XGrammar] = []
    for kind in kinds:
        started = time.perf_counter()
        libraries.append(kind(model))
        version = importlib.metadata.version(kind.name)
        print(f"{kind.name} {version}: the vocabulary took {time.perf_counter() - started:.2f} s")
    print(
        "| schema | tokens | library | compile ms | mask us: first walk, mean (largest) | again | accept us |"
    )
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        tokens = tokenizer.encode(json.dumps(case.document), add_special_tokens=False).ids
        walks: dict[str, list[tuple[Walk, Walk]]] = {library.name: [] for library in libraries}
        for turn in range(rounds):
            for library in libraries[:: 1 if turn % 2 else -1]:
                walks[library.name].append(walk(library, case, tokens))
        for name, pairs in walks.items():
            print(f"| {case.name} | {len(tokens)} | {name} | {' | '.join(_cells(pairs))} |")


def _cells(pairs: list[tuple[Walk, Walk]]) -> Iterator[str]:
    """Medians over rounds."""
    median = statistics.median
    yield f"{median(first.compile_seconds for first, _ in pairs) * 1e3:.2f}"
    for walks in zip(*pairs, strict=True):
        mean = median(statistics.mean(walk.masks) for walk in walks)
        yield f"{mean * 1e6:.0f} ({median(max(walk.masks) for walk in walks) * 1e6:.0f})"
    yield f"{median(statistics.mean(again.accepts) for _, again in pairs) * 1e6:.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    compare_libraries(parser.parse_args().rounds)


if __name__ == "__main__":
    main()
