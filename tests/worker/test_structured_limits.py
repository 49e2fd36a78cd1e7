"""What else a request asks for, beside a grammar: limits, bans, ends, and grammars that grow too complex."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from grammar_engine import PROMPT, TOKENIZER, asked, engine, run
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from sfllm.messages import Sampling
from sfllm_worker.load import LoadedModel, load_model
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.device import DeviceSampler
from sfllm_worker.sampling.sampler import sample
from sfllm_worker.structured import constraint, grammars
from sfllm_worker.structured.constraint import Constraint, masks_of
from sfllm_worker.structured.grammars import Grammars, begin

EOS = 256


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-llama", dtype="float32", load_format="dummy")


@pytest.fixture(scope="module")
def compiler(model: LoadedModel) -> Grammars:
    return Grammars(model.assets["tokenizer.json"], model.config.vocab_size, model.eos_token_ids)


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def token(character: str) -> int:
    (only,) = TOKENIZER.encode(character).ids
    return int(only)


def leaves() -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.tuples(st.integers(-20, 20), st.integers(0, 30)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": sum(pair)}
    )
    return st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": 'é"\\'}, {"const": 2.5}]),
        st.integers(0, 3).map(lambda most: {"type": "string", "maxLength": most}),
        st.lists(st.sampled_from(["red", "green", "a b"]), min_size=1, unique=True).map(
            lambda words: {"enum": words}
        ),
        bounds,
    )


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.tuples(inner, st.integers(0, 1), st.integers(1, 2)).map(
        lambda parts: {"type": "array", "items": parts[0], "minItems": parts[1], "maxItems": parts[2]}
    )
    objects = st.dictionaries(st.sampled_from(["a", "b c", "é"]), inner, min_size=1, max_size=2).map(
        lambda fields: {
            "type": "object",
            "properties": fields,
            "required": list(fields),
            "additionalProperties": False,
        }
    )
    return st.one_of(arrays, objects)


def allows(schema: dict[str, Any], value: Any) -> bool:
    """Whether a document follows one of these schemas."""
    match schema:
        case {"const": _} | {"enum": _}:
            return value in schema.get("enum", [schema.get("const")])
        case {"type": "array", "items": items}:
            enough = schema["minItems"] <= len(value) <= schema["maxItems"]
            return enough and all(allows(items, each) for each in value)
        case {"type": "object", "properties": fields}:
            return set(value) == set(fields) and all(allows(fields[name], value[name]) for name in fields)
        case {"type": "integer"}:
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case {"type": "string"}:
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case _:
            return isinstance(value, {"null": type(None), "boolean": bool}[schema["type"]])


@given(
    st.one_of(leaves(), nested(leaves()), nested(nested(leaves()))),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.7, 1.5]),
)
@settings(max_examples=40, deadline=None)
def test_whatever_the_schema_an_answer_follows_it(
    model: LoadedModel, compiler: Grammars, schema: dict[str, Any], seed: int, temperature: float
) -> None:
    grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    sequence = asked(0, grammar, seed=seed, temperature=temperature, max_tokens=380)
    answer = run(engine(model, compiler), sequence)[0, 0]
    assert answer.finish == "stop"
    assert allows(schema, json.loads(answer.text))


def test_the_end_of_text_comes_only_where_the_grammar_may_end(model: LoadedModel, compiler: Grammars) -> None:
    wants_to_end = {"logit_bias": ((EOS, 100.0),)}
    answer = run(engine(model, compiler), asked(0, regex("[ab]{3,9}"), **wants_to_end))[0, 0]
    assert (answer.finish, len(answer.tokens)) == ("stop", 3)
    assert answer.last is not None
    assert answer.last.stop_token_id == EOS


def test_who_ignores_the_end_of_text_gets_all_that_the_grammar_has(
    model: LoadedModel, compiler: Grammars
) -> None:
    wants_to_end = {"logit_bias": ((EOS, 100.0),), "ignore_eos": True}
    sequences = [
        asked("nine", regex("[ab]{3,9}"), **wants_to_end),
        asked("endless", regex("[ab]*"), max_tokens=40, **wants_to_end),
        asked("nothing", regex("(a|)"), **wants_to_end),
    ]
    found = run(engine(model, compiler), *sequences)
    assert {key: (answer.finish, len(answer.tokens)) for (key, _), answer in found.items()} == {
        "nine": ("stop", 9),
        "endless": ("length", 40),
        "nothing": ("stop", 1),
    }


def test_least_tokens_hold_as_far_as_the_grammar_goes(model: LoadedModel, compiler: Grammars) -> None:
    wants_to_end = {"logit_bias": ((EOS, 100.0),), "min_tokens": 7}
    longer = asked("longer", regex("[ab]{3,9}"), **wants_to_end)
    shorter = asked("shorter", regex("(no|yes)"), **wants_to_end)
    empty = asked("empty", regex(""), **wants_to_end)
    found = run(engine(model, compiler), longer, shorter, empty)
    assert len(found["longer", 0].tokens) == 7
    assert found["shorter", 0].text in ("no", "yes")
    assert found["empty", 0].tokens == []
    assert {answer.finish for answer in found.values()} == {"stop"}


def test_a_stop_token_that_the_grammar_allows_ends_a_text_within_it(
    model: LoadedModel, compiler: Grammars
) -> None:
    stop = token("b")
    sequence = asked(0, regex("a{3}bc"), stop_token_ids=(stop,))
    answer = run(engine(model, compiler), sequence)[0, 0]
    assert answer.text == "aaa"
    assert answer.last is not None
    assert (answer.finish, answer.last.stop_token_id) == ("stop", stop)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"allowed_token_ids": (98, 99)}, "bcbcbc"),
        ({"allowed_token_ids": (120,)}, "abcabc"),
        ({"bad_words": ((97,), (98,))}, "cccccc"),
        ({"bad_words": ((97,), (98,), (99,))}, "abcabc"),
        ({"bad_words": ((97, 98), (99, 97), (98, 98), (99, 99), (97, 97))}, None),
    ],
    ids=["some allowed", "none allowed", "two banned", "all banned", "pairs banned"],
)
def test_other_bans_hold_within_the_grammar_and_give_way_to_it(
    model: LoadedModel, compiler: Grammars, fields: dict[str, Any], expected: str | None
) -> None:
    """The numbers are byte values; a byte's token is another."""

    def tokens(value: Any) -> Any:
        return token(chr(value)) if isinstance(value, int) else tuple(map(tokens, value))

    named = {name: tokens(value) for name, value in fields.items()}
    text = run(engine(model, compiler), asked(0, regex("[abc]{6}"), **named))[0, 0].text
    assert len(text) == 6
    assert set(text) <= set(expected or "abc")
    for word in fields.get("bad_words", ()):
        if len(word) > 1:
            assert bytes(word).decode() not in text


def test_penalties_and_top_p_work_within_the_grammar(model: LoadedModel, compiler: Grammars) -> None:
    fields = {"frequency_penalty": 2.0, "repetition_penalty": 1.5, "top_p": 0.5, "top_k": 3}
    answer = run(engine(model, compiler), asked(0, regex("[a-z]{30}"), **fields))[0, 0]
    assert len(set(answer.text)) > 15, "what came is less likely to come again"


def test_a_grammar_that_grows_too_complex_ends_its_request_alone(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "MAX_LEXER_STATES", 10)
    small = Grammars(model.assets["tokenizer.json"], model.config.vocab_size, model.eos_token_ids)
    found = run(engine(model, small), asked("deep", regex("[ab]{40}")), asked("plain", max_tokens=5))
    last = found["deep", 0].last
    assert last is not None
    assert (last.finish, last.token) == ("refused", None)
    assert "too many states" in last.problem
    assert found["plain", 0].finish == "length"


def test_long_prompts_come_in_chunks_and_from_the_cache(model: LoadedModel, compiler: Grammars) -> None:
    e = engine(model, compiler)
    prompt = PROMPT * 5
    texts = []
    for _ in range(2):
        sequence = asked(0, regex("[a-z]{12}"), tokens=prompt)
        sequence.prompt_count = len(prompt)
        texts.append(run(e, sequence)[0, 0].text)
    assert texts[0] == texts[1]
    assert e.prefix_hit_tokens > 0


def test_steps_ahead_wait_for_what_a_grammar_needs(model: LoadedModel, compiler: Grammars) -> None:
    def tokens(**fields: Any) -> dict[tuple[object, int], list[int]]:
        sequences = [asked("free", max_tokens=20), asked("json", regex("[a-z ]{5,15}"), forks=2)]
        answers = run(engine(model, compiler, **fields), *sequences)
        return {key: answer.tokens for key, answer in answers.items()}

    ahead = tokens(sampler=DeviceSampler(torch.device("cpu")), overlap=True)
    assert ahead == tokens()


def rows_within(compiler: Grammars, *patterns: str) -> list[SamplingRow]:
    """Alternately random and greedy; every third row has no grammar."""
    found = []
    for index, pattern in enumerate(patterns):
        limits = {"min_tokens": 3} if index % 4 == 1 else {}
        sampling = Sampling(max_tokens=9, seed=index, temperature=index % 2, logprobs=1, **limits)
        within = begin(compiler.compile(regex(pattern)).result(), ()) if index % 3 else None
        banned = (EOS,) if limits else ()
        found.append(SamplingRow(sampling, 0, PROMPT, len(PROMPT), banned, constraint=within))
    return found


def test_a_gpus_sampler_masks_as_a_cpus_does(compiler: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_within(compiler, *(["[a-f]{3}", "x?", "(yes|no)", "", "[0-9]+|z"] * 3))
    logits = torch.randn(len(rows), 512, generator=torch.Generator().manual_seed(2)) * 3
    ours = DeviceSampler(torch.device("cpu")).launch(logits.clone(), rows).read()
    natively = sample(logits.clone(), rows)
    monkeypatch.setattr("sfllm_worker.sampling.sampler.can_choose_natively", lambda _: False)
    in_torch = sample(logits.clone(), rows)
    assert ours[:2] == natively[:2] == in_torch[:2]
    assert all(natively.sound)


def test_many_masks_are_computed_at_once_as_one_by_one(
    compiler: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns = [f"[a-z]{{{number},40}}" for number in range(1, 30)]
    found: list[Constraint] = [begin(compiler.compile(regex(each)).result(), ()) for each in patterns]
    together = masks_of(found, 512)
    monkeypatch.setattr(constraint, "FEW", len(found))
    assert (masks_of(found, 512) == together).all()
    assert together.any(axis=1).all()


def test_what_nobody_waits_for_any_more_is_not_compiled(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def slow_tokenizer(*values: Any, **fields: Any) -> LLTokenizer:
        assert go.wait(60)
        return LLTokenizer(*values, **fields)

    monkeypatch.setattr(grammars, "THREADS", 1)
    monkeypatch.setattr(grammars, "LLTokenizer", slow_tokenizer)
    small = Grammars(model.assets["tokenizer.json"], model.config.vocab_size, model.eos_token_ids)
    e = engine(model, small)
    first, second = (asked(number, regex("[a-z]{9}")) for number in range(2))
    e.add(first)
    e.add(second)
    waited_for = small.compile(first.sampling.grammar)
    e.cancel(first)
    assert not waited_for.cancelled(), "another request needs it"
    e.cancel(second)
    assert waited_for.cancelled()
    go.set()
    assert run(e, asked("again", first.sampling.grammar))["again", 0].finish == "stop"
