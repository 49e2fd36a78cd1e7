"""`POST /v1/embeddings` by a real gateway process: texts in, the model's rows out."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_scheduler import FakeScheduler, model_card, row_of
from gateway_process import GatewayProcess
from http_client import error, post

from sfllm.messages import ModelState, Pooling, Submit

EMBEDDINGS = "/v1/embeddings"
MODELS = (
    model_card("plain", (), Pooling("mean", 4, normalizes=False)),
    model_card("unit", (), Pooling("last", 4)),
    model_card("chat", ()),
)


@pytest.fixture(scope="module")
def embedder() -> Iterator[tuple[FakeScheduler, GatewayProcess]]:
    scheduler = FakeScheduler()
    scheduler.models = tuple(ModelState(card, 1) for card in MODELS)
    process = GatewayProcess(scheduler)
    try:
        process.wait_ready()
        yield scheduler, process
    finally:
        code, log = process.stop()
        scheduler.close()
    assert code == 0, log


def embed(gateway: GatewayProcess, given: Any, **fields: Any) -> Any:
    answer = post(gateway, EMBEDDINGS, {"input": given, "model": "plain", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_each_text_gets_its_row_in_order(embedder: tuple[FakeScheduler, GatewayProcess]) -> None:
    _, gateway = embedder
    texts = ["a", "bc", "a longer text", "bc"]
    found = embed(gateway, texts)
    rows = [row_of(list(text.encode())) for text in texts]
    assert found == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": number, "embedding": list(row)}
            for number, row in enumerate(rows)
        ],
        "model": "plain",
        "usage": {"prompt_tokens": 18, "total_tokens": 18},
    }


def test_what_workers_are_asked_for_is_the_models_way_of_pooling(
    embedder: tuple[FakeScheduler, GatewayProcess],
) -> None:
    scheduler, gateway = embedder
    embed(gateway, "x", model="unit", priority=-3)
    submit = [message for message in scheduler.seen if isinstance(message, Submit)][-1]
    assert (submit.sampling.pooling, submit.sampling.max_tokens, submit.priority) == ("last", 1, -3)


@pytest.mark.parametrize("given", ["xyz", [120, 121, 122], ["xyz"], [[120, 121, 122]]])
def test_texts_and_token_ids_mean_the_same(
    embedder: tuple[FakeScheduler, GatewayProcess], given: Any
) -> None:
    assert embed(embedder[1], given)["data"][0]["embedding"] == list(row_of(b"xyz"))


def test_rows_are_normalized_where_the_model_says_so_and_where_they_are_cut(
    embedder: tuple[FakeScheduler, GatewayProcess],
) -> None:
    row = row_of(b"hello")
    (unit,) = embed(embedder[1], "hello", model="unit")["data"]
    assert unit["embedding"] == pytest.approx([value / math.hypot(*row) for value in row])
    (cut,) = embed(embedder[1], "hello", dimensions=2)["data"]
    assert cut["embedding"] == pytest.approx([value / math.hypot(*row[:2]) for value in row[:2]])


def test_base64_holds_the_same_numbers(embedder: tuple[FakeScheduler, GatewayProcess]) -> None:
    (item,) = embed(embedder[1], "hello", encoding_format="base64")["data"]
    assert list(array("f", base64.b64decode(item["embedding"]))) == list(row_of(b"hello"))


def test_a_long_text_can_be_cut_at_its_beginning(embedder: tuple[FakeScheduler, GatewayProcess]) -> None:
    text = "x" * 600
    answer = post(embedder[1], EMBEDDINGS, {"input": ["a", text], "model": "plain"})
    assert error(answer, 400)["code"] == "context_length_exceeded"
    (item,) = embed(embedder[1], text + "end", truncate_prompt_tokens=3)["data"]
    assert item["embedding"] == list(row_of(b"end"))
    (most,) = embed(embedder[1], text, truncate_prompt_tokens=-1)["data"]
    assert most["embedding"][0] == 511


def test_a_row_that_got_lost_is_made_again(embedder: tuple[FakeScheduler, GatewayProcess]) -> None:
    scheduler, gateway = embedder
    scheduler.script.forget_embeddings = 1
    assert embed(gateway, "again")["data"][0]["embedding"] == list(row_of(b"again"))
    assert scheduler.script.forget_embeddings == 0


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": ["a", [1]]}, 400, "input"),
        ({"input": [70000]}, 400, "input"),
        ({"input": ["a"] * 1025}, 400, "input"),
        ({}, 400, "input"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions"),
        ({"input": "a", "dimensions": 5}, 400, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "a", "model": "chat"}, 501, "model"),
        ({"input": "a", "model": "nobody"}, 404, "model"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(
    embedder: tuple[FakeScheduler, GatewayProcess], fields: dict[str, Any], status: int, param: str
) -> None:
    answer = post(embedder[1], EMBEDDINGS, {"model": "plain", **fields})
    assert error(answer, status)["param"] == param


def test_the_openai_client_gets_its_numbers(embedder: tuple[FakeScheduler, GatewayProcess]) -> None:
    client = openai.OpenAI(base_url=embedder[1].url + "/v1", api_key="none", max_retries=0)
    found = client.embeddings.create(model="plain", input=["one", "two"])  # asks for base64 by itself
    assert [item.embedding for item in found.data] == [list(row_of(b"one")), list(row_of(b"two"))]
