"""Output that follows a grammar, by the engine over a tiny real model."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from chaos.metrics import total
from grammar_engine import PROMPT, TOKENIZER, asked, engine, run
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from sfllm.metrics import Metrics
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.load import LoadedModel, load_model
from sfllm_worker.metrics import WorkerMetrics
from sfllm_worker.structured.grammars import Grammars

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
JSON_GRAMMAR = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-llama", dtype="float32", load_format="dummy")


@pytest.fixture(scope="module")
def grammars(model: LoadedModel) -> Grammars:
    return Grammars(model.assets["tokenizer.json"], model.config.vocab_size, model.eos_token_ids)


def check(value: Any) -> None:
    assert set(value) == {"name", "size", "tags"}
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 6
    assert 0 <= value["size"] <= 999
    assert 1 <= len(value["tags"]) <= 3
    assert {*value["tags"]} <= {"red", "green"}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_an_answer_is_valid_and_ends_when_nothing_can_follow(
    model: LoadedModel, grammars: Grammars, temperature: float
) -> None:
    answer = run(engine(model, grammars), asked(0, JSON_GRAMMAR, temperature=temperature))[0, 0]
    check(json.loads(answer.text))
    assert answer.finish == "stop"
    assert answer.text.endswith("}"), "the token that completes it is part of it"


@given(
    st.sampled_from(["[0-9]{3}-[0-9]{4}", "(yes|no|maybe)", r"[a-c]{2,7}", r"x+y"]),
    st.integers(0, 2**32),
    st.floats(0, 2),
)
@settings(max_examples=25, deadline=None)
def test_regular_expressions_are_followed(
    model: LoadedModel, grammars: Grammars, pattern: str, seed: int, temperature: float
) -> None:
    grammar = LLMatcher.grammar_from_regex(pattern)
    answer = run(engine(model, grammars), asked(0, grammar, seed=seed, temperature=temperature))[0, 0]
    if answer.finish == "stop":
        assert re.fullmatch(pattern, answer.text)
    else:
        assert len(answer.tokens) == 200, "only an unbounded text can run into its length"


def test_choices_of_one_request_follow_it_each_in_its_own_way(model: LoadedModel, grammars: Grammars) -> None:
    found = run(engine(model, grammars), asked(0, JSON_GRAMMAR, forks=4))
    assert len(found) == 5
    for answer in found.values():
        check(json.loads(answer.text))
    assert len({answer.text for answer in found.values()}) > 1


def test_neighbours_in_a_batch_do_not_see_each_others_grammars(
    model: LoadedModel, grammars: Grammars
) -> None:
    def sequences() -> list[Sequence]:
        plain = [asked(n, tokens=PROMPT, seed=n, max_tokens=30, ignore_eos=True) for n in range(3)]
        limited = [asked(n + 3, JSON_GRAMMAR, seed=n) for n in range(3)]
        return [*plain, *limited, asked(6, LLMatcher.grammar_from_regex("(yes|no)"))]

    alone = {
        key: value.tokens for each in sequences() for key, value in run(engine(model, grammars), each).items()
    }
    together = run(engine(model, grammars), *sequences())
    assert {key: value.tokens for key, value in together.items()} == alone


def test_a_text_that_moved_to_another_worker_goes_on_in_its_grammar(
    model: LoadedModel, grammars: Grammars
) -> None:
    whole = run(engine(model, grammars), asked(0, JSON_GRAMMAR, seed=9))[0, 0].tokens
    for cut in range(1, len(whole)):
        moved = asked(0, JSON_GRAMMAR, tokens=PROMPT + whole[:cut], seed=9)
        assert whole[:cut] + run(engine(model, grammars), moved)[0, 0].tokens == whole


def test_preempted_texts_stay_in_their_grammar(model: LoadedModel, grammars: Grammars) -> None:
    sequences = [asked(n, JSON_GRAMMAR, seed=n) for n in range(8)]
    e = engine(model, grammars, blocks=40)
    for sequence in sequences:
        e.add(sequence)
    preempted = 0
    texts: dict[object, list[int]] = {}
    for _ in range(5000):
        if not e.has_work:
            break
        result = e.step()
        preempted += result.preempted
        for progress in result.progress:
            assert progress.token is not None
            texts.setdefault(progress.sequence.key, []).append(progress.token)
    assert not e.has_work
    assert preempted > 0
    for tokens in texts.values():
        check(json.loads(TOKENIZER.decode(tokens)))


def test_log_probabilities_are_the_models_own(model: LoadedModel, grammars: Grammars) -> None:
    answer = run(engine(model, grammars), asked(0, LLMatcher.grammar_from_regex("q"), logprobs=0))[0, 0]
    assert answer.last is not None
    assert TOKENIZER.id_to_token(answer.last.logprobs.ids[0]) == "q"
    assert answer.last.logprobs.values[0] < -1e-3, "there were other tokens, had the grammar allowed them"


def test_a_grammar_that_does_not_compile_is_refused_and_others_go_on(
    model: LoadedModel, grammars: Grammars
) -> None:
    found = run(engine(model, grammars), asked("bad", "start: {"), asked("good", JSON_GRAMMAR))
    assert found["bad", 0].finish == "refused"
    assert found["bad", 0].last is not None
    assert found["bad", 0].last.problem
    check(json.loads(found["good", 0].text))


def test_a_text_that_does_not_follow_its_grammar_so_far_is_refused(
    model: LoadedModel, grammars: Grammars
) -> None:
    moved = asked(0, JSON_GRAMMAR, tokens=PROMPT + TOKENIZER.encode("[1, 2").ids)
    assert run(engine(model, grammars), moved)[0, 0].finish == "refused"


def test_a_cancelled_request_is_forgotten_while_its_grammar_is_compiled(
    model: LoadedModel, grammars: Grammars
) -> None:
    e = engine(model, grammars)
    sequence = asked(0, LLMatcher.grammar_from_regex("[a-z]{1,300}[0-9]{1,300}"))
    e.add(sequence)
    assert (e.has_work, e.num_waiting) == (True, 1)
    e.cancel(sequence)
    assert (e.has_work, e.num_waiting) == (False, 0)


def test_a_grammar_compiles_once_and_is_forgotten_when_many_others_came(grammars: Grammars) -> None:
    first = grammars.compile(LLMatcher.grammar_from_regex("first"))
    assert grammars.compile(LLMatcher.grammar_from_regex("first")) is first
    for number in range(200):
        grammars.compile(LLMatcher.grammar_from_regex(f"n{number}"))
    assert grammars.compile(LLMatcher.grammar_from_regex("first")) is not first


def test_compilations_are_timed_and_those_found_counted(model: LoadedModel) -> None:
    grammars = Grammars(model.assets["tokenizer.json"], model.config.vocab_size, model.eos_token_ids)
    e = engine(model, grammars)
    registry = Metrics("sfllm:")
    shown = WorkerMetrics(registry, "m", "w")
    shown.watch_grammars(grammars.figures)
    for key in range(3):
        run(e, asked(key, JSON_GRAMMAR))
    run(e, asked(3, "no grammar at all"))
    for _ in range(2):  # what was counted once is not counted again
        shown.state(e)
        page = registry.render().decode()
        assert total(page, "sfllm:grammar_cache_queries_total") == 4
        assert total(page, "sfllm:grammar_cache_hits_total") == 2
        assert total(page, "sfllm:grammar_compile_seconds_count") == 2


def test_a_tokenizer_that_no_grammar_knows_is_said_to_the_client(model: LoadedModel) -> None:
    words = b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []}'
    found = run(engine(model, Grammars(words, 1, (0,))), asked(0, JSON_GRAMMAR))
    assert found[0, 0].last is not None
    assert "tokenizer" in found[0, 0].last.problem
