"""Output that follows a grammar, of whole worker processes and of the default model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from llguidance import LLMatcher
from scheduler_peer import MOCK, TINY, SchedulerPeer
from tokenizers import Tokenizer

from sfllm.errors import ErrorCode
from sfllm.messages import Sampling, WorkerFault
from sfllm.settings import WorkerSettings
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.load import load_model
from sfllm_worker.load.dummy import byte_tokenizer
from sfllm_worker.startup import build_engine

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "languages": {"type": "array", "items": {"enum": ["English", "Français", "日本語"]}, "maxItems": 3},
    },
    "required": ["name", "age", "languages"],
    "additionalProperties": False,
}


def within(grammar: str, **fields: object) -> Sampling:
    return Sampling(**{"max_tokens": 60, "seed": 3, "grammar": grammar, **fields})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SchedulerPeer]:
    peer = SchedulerPeer(tmp_path_factory.mktemp("worker"), *TINY)
    peer.welcome()
    yield peer
    peer.close()


def test_a_granted_request_follows_its_grammar(worker: SchedulerPeer) -> None:
    worker.grant(handle=1, sampling=within(LLMatcher.grammar_from_regex("[0-9]{4}-[a-f]{2}")))
    ids, end = worker.run_to_finish()
    text = byte_tokenizer(512).decode(ids)
    assert len(text) == 7
    assert text[:4].isdigit()
    finished = end.finished
    assert (finished.reason, finished.stop_token_id, finished.generated_tokens) == ("stop", -1, 7)


def test_a_grammar_that_does_not_compile_ends_its_request_and_the_worker_goes_on(
    worker: SchedulerPeer,
) -> None:
    worker.grant(handle=2, sampling=within("start: missing"))
    fault, _ = worker.expect(WorkerFault)
    assert (fault.handle, fault.code) == (2, ErrorCode.INVALID_REQUEST)
    assert "missing" in fault.message
    worker.grant(handle=3, sampling=within(LLMatcher.grammar_from_regex("ok")))
    ids, _ = worker.run_to_finish()
    assert byte_tokenizer(512).decode(ids) == "ok"
    assert worker.wait_until_idle().digest == 0


def test_choices_of_a_request_whose_grammar_does_not_compile_end_together(worker: SchedulerPeer) -> None:
    worker.grant(handle=4, choices=(0, 1, 2), generated_counts=(0, 0, 0), sampling=within("start: missing"))
    fault, _ = worker.expect(WorkerFault)
    assert fault.handle == 4
    beat = worker.wait_until_idle()
    assert (beat.digest, beat.free_kv_tokens) == (0, 2048)


def test_a_worker_that_makes_its_tokens_up_refuses_grammars(tmp_path: Path) -> None:
    mock = SchedulerPeer(tmp_path, *MOCK)
    try:
        mock.welcome()
        mock.grant(sampling=within(LLMatcher.grammar_from_regex("ok")))
        fault, _ = mock.expect(WorkerFault)
        assert fault.code == ErrorCode.INVALID_REQUEST
        assert "grammar" in fault.message
    finally:
        mock.close()


def test_the_default_model_answers_by_a_schema(smollm2_gguf: Path) -> None:
    model = load_model(smollm2_gguf, dtype="bfloat16")
    tokenizer = Tokenizer.from_str(model.assets["tokenizer.json"].decode())
    settings = WorkerSettings(max_batch_size=4, max_context_length=256)
    engine = build_engine(settings, model, torch.device("cpu"))
    prompt = tokenizer.encode("<|im_start|>user\nDescribe Ada.<|im_end|>\n<|im_start|>assistant\n").ids
    grammar = LLMatcher.grammar_from_json_schema(PERSON, overrides={"whitespace_flexible": False})
    for seed in range(3):
        sampling = within(grammar, seed=seed, max_tokens=150)
        engine.add(Sequence(seed, 0, list(prompt), len(prompt), sampling))
    ends = []
    while engine.has_work:
        ends += [progress for progress in engine.step().progress if progress.finish]
    assert [end.finish for end in ends] == ["stop"] * 3
    for end in ends:
        answer = json.loads(tokenizer.decode(end.sequence.tokens[len(prompt) :]))
        assert set(answer) == set(PERSON["required"])
        assert 0 <= answer["age"] <= 150
        assert len(answer["name"]) <= 30
        assert {*answer["languages"]} <= {"English", "Français", "日本語"}
    engine.close()
