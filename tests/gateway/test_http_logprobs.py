"""Log probabilities and echoed prompts as clients get them from a real gateway process."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fake_scheduler import END_TOKEN, FakeScheduler, candidates
from gateway_process import GatewayProcess
from http_client import complete, error, finish_reasons, post, stream, text_of

from sfllm.messages import Cancel, Submit

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EURO = [0xE2, 0x82, 0xAC]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def own(token: int) -> float:
    """The log probability that an answer must show for a token."""
    return max(-9999.0, candidates(token, 0)[0][1])


def chat(gateway: GatewayProcess, **fields: Any) -> Any:
    answer = post(gateway, CHAT, fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def logprobs_of(chunks: list[Any], index: int = 0) -> list[dict[str, Any]]:
    return [
        choice["logprobs"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index and choice["logprobs"] is not None
    ]


def test_a_chat_reports_each_token_with_its_bytes_and_the_likeliest(gateway: GatewayProcess) -> None:
    answer = chat(gateway, messages=user("say:b€"), logprobs=True, top_logprobs=2)
    found = answer["choices"][0]["logprobs"]
    assert found["refusal"] is None
    assert found["content"][0] == {
        "token": "b",
        "logprob": -0.25,
        "bytes": [98],
        "top_logprobs": [
            {"token": "b", "logprob": -0.25, "bytes": [98]},
            {"token": "c", "logprob": -1.5, "bytes": [99]},
        ],
    }
    pieces = found["content"][1:]
    assert [piece["token"] for piece in pieces] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert [byte for piece in pieces for byte in piece["bytes"]] == EURO


def test_a_chat_without_top_logprobs_reports_only_the_tokens_own(gateway: GatewayProcess) -> None:
    content = chat(gateway, messages=user("say:hi"), logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["top_logprobs"]) for entry in content] == [("h", []), ("i", [])]


def test_minus_infinity_is_a_number_that_json_has(gateway: GatewayProcess) -> None:
    choice = chat(gateway, messages=user("say:z"), logprobs=True, top_logprobs=1)["choices"][0]
    entry = choice["logprobs"]["content"][0]
    assert (entry["token"], entry["logprob"]) == ("z", -9999.0)
    assert [top["token"] for top in entry["top_logprobs"]] == ["a"]


@pytest.mark.parametrize("tokens_per_message", [1, 3, 50])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("fields", [{}, {"stop": "gh"}, {"n": 2, "stop": "xyzzy"}])
def test_the_logprobs_of_a_stream_add_up_to_those_of_the_whole_answer(
    gateway: GatewayProcess,
    scheduler: FakeScheduler,
    fields: dict[str, Any],
    path: str,
    tokens_per_message: int,
) -> None:
    scheduler.script.tokens_per_message = tokens_per_message
    is_chat = path == CHAT
    wanted = {"logprobs": True, "top_logprobs": 1} if is_chat else {"logprobs": 1}
    body: dict[str, Any] = {"messages": user("x"), "prompt": "x", "max_tokens": 12, **wanted, **fields}
    whole = post(gateway, path, body).json()
    chunks = stream(gateway, path, **body)
    for index in range(fields.get("n", 1)):
        pieces = logprobs_of(chunks, index)
        for name, values in whole["choices"][index]["logprobs"].items():
            if values is not None:
                assert [value for piece in pieces for value in piece[name]] == values


@pytest.mark.parametrize("tokens_per_message", [1, 50])
def test_tokens_behind_a_stop_string_are_not_reported(
    gateway: GatewayProcess, scheduler: FakeScheduler, tokens_per_message: int
) -> None:
    scheduler.script.tokens_per_message = tokens_per_message
    answer = complete(gateway, prompt="x", stop="cd", max_tokens=20, logprobs=0)
    assert answer["choices"][0]["text"] == "ab"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["a", "b", "c", "d"]


def test_a_completion_reports_four_lists_of_one_length(gateway: GatewayProcess) -> None:
    choice = complete(gateway, prompt="say:b€z", logprobs=2)["choices"][0]
    assert choice["logprobs"] == {
        "text_offset": [0, 1, 1, 1, 2],
        "token_logprobs": [-0.25, -0.25, -0.25, -0.25, -9999.0],
        "tokens": ["b", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "z"],
        "top_logprobs": [
            {"b": -0.25, "c": -1.5},
            {"bytes:\\xe2": -0.25, "bytes:\\xe3": -1.5},
            {"bytes:\\x82": -0.25, "bytes:\\x83": -1.5},
            {"bytes:\\xac": -0.25, "bytes:\\xad": -1.5},
            {"z": -9999.0, "a": -0.5, "b": -1.5},
        ],
    }


def test_tokens_can_be_named_by_their_ids(gateway: GatewayProcess) -> None:
    fields = {"logprobs": 1, "return_tokens_as_token_ids": True}
    logprobs = complete(gateway, prompt="say:b", **fields)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:98"]
    assert logprobs["top_logprobs"] == [{"token_id:98": -0.25}]


def test_logprobs_survive_a_lost_worker(gateway: GatewayProcess, scheduler: FakeScheduler) -> None:
    expected = complete(gateway, prompt="x", max_tokens=9, logprobs=3)["choices"]
    scheduler.script.interrupt_at = [4, 6]
    scheduler.script.skip_at = [2]
    scheduler.script.repeat_tokens = True
    assert complete(gateway, prompt="x", max_tokens=9, logprobs=3)["choices"] == expected


def test_an_echoed_prompt_is_scored_and_its_first_token_has_no_logprob(gateway: GatewayProcess) -> None:
    choice = complete(gateway, prompt="say:ab", echo=True, logprobs=1, max_tokens=1)["choices"][0]
    assert choice["text"] == "say:aba"
    found = choice["logprobs"]
    assert found["tokens"] == list("say:aba")
    assert found["text_offset"] == list(range(7))
    assert found["token_logprobs"] == [None, *map(own, b"ay:aba")]
    assert found["top_logprobs"][0] is None
    assert found["top_logprobs"][1] == {"a": -0.25}


def test_scoring_counts_on_one_token_even_where_the_text_ends(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": 1}
    choice = complete(gateway, prompt=[*b"ab", END_TOKEN], **fields)["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == 4
    choice = complete(gateway, prompt=[*b"say:"], **fields)["choices"][0]
    assert choice["logprobs"]["tokens"] == [*"say:", "<|im_end|>"]
    assert choice["text"] == "say:"


@pytest.mark.parametrize("n", [1, 2])
def test_echo_alone_puts_the_prompt_before_every_choice(gateway: GatewayProcess, n: int) -> None:
    fields = {"prompt": ["say:é", "say:b"], "echo": True, "n": n}
    expected = [text for text in ("say:éé", "say:bb") for _ in range(n)]
    answer = complete(gateway, **fields)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    chunks = stream(gateway, COMPLETIONS, **fields)
    assert [text_of(chunks, index) for index in range(2 * n)] == expected


def test_a_stream_carries_the_echo_with_its_logprobs_first(gateway: GatewayProcess) -> None:
    fields = {"prompt": "say:ab", "echo": True, "logprobs": 1}
    whole = complete(gateway, **fields)["choices"][0]
    chunks = stream(gateway, COMPLETIONS, **fields)
    assert text_of(chunks) == whole["text"]
    pieces = logprobs_of(chunks)
    for name, values in whole["logprobs"].items():
        assert [value for piece in pieces for value in piece[name]] == values


@pytest.mark.parametrize("streaming", [False, True])
def test_echo_of_no_tokens_asks_no_worker(
    gateway: GatewayProcess, scheduler: FakeScheduler, streaming: bool
) -> None:
    fields = {"prompt": [[*b"ab"], [*b"cd"]], "echo": True, "max_tokens": 0}
    if streaming:
        chunks = stream(gateway, COMPLETIONS, **fields)
        assert [text_of(chunks, index) for index in range(2)] == ["ab", "cd"]
        assert finish_reasons(chunks) == ["length"]
    else:
        answer = complete(gateway, **fields)
        assert [choice["text"] for choice in answer["choices"]] == ["ab", "cd"]
        assert answer["usage"]["completion_tokens"] == 0
        assert answer["usage"]["prompt_tokens"] == 4
    assert not scheduler.of(Submit)


def test_echo_of_no_tokens_can_be_scored(gateway: GatewayProcess, scheduler: FakeScheduler) -> None:
    answer = complete(gateway, prompt="say:ab", echo=True, max_tokens=0, logprobs=1)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("say:ab", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, *map(own, b"ay:ab")]
    assert answer["usage"]["completion_tokens"] == 0
    assert len(scheduler.of(Submit)) == 1


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_prompt_logprobs_are_listed_by_token_id_with_ranks(gateway: GatewayProcess, path: str) -> None:
    body = {"prompt": "yzy", "messages": user("yzy"), "prompt_logprobs": 2, "max_tokens": 1}
    answer = post(gateway, path, body).json()
    found = (answer if path == CHAT else answer["choices"][0])["prompt_logprobs"]
    assert found[0] is None
    assert len(found) == answer["usage"]["prompt_tokens"]
    start = 0 if path == COMPLETIONS else len(b"\x00user\n")
    assert found[start + 1] == {
        "122": {"logprob": -9999.0, "rank": None, "decoded_token": "z"},
        "97": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
        "98": {"logprob": -1.5, "rank": 2, "decoded_token": "b"},
    }
    assert found[start + 2]["121"] == {"logprob": -0.25, "rank": 1, "decoded_token": "y"}


def test_prompt_logprobs_that_were_lost_are_asked_for_again(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    prompt = "a long enough prompt"
    expected = complete(gateway, prompt=prompt, prompt_logprobs=1, max_tokens=2)["choices"]
    scheduler.script.skip_prompt_at = [4]
    assert complete(gateway, prompt=prompt, prompt_logprobs=1, max_tokens=2)["choices"] == expected
    assert scheduler.wait_for(Cancel)


def test_the_end_of_a_prompt_can_be_lost_and_comes_again(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    scheduler.script.skip_prompt_at = [4]
    found = complete(gateway, prompt="abcdefgh", prompt_logprobs=0, max_tokens=1)["choices"][0]
    assert [next(iter(entry.values()))["logprob"] for entry in found["prompt_logprobs"][1:]] == [-0.25] * 7


def test_a_prompt_of_one_token_has_nothing_to_report(gateway: GatewayProcess) -> None:
    choice = complete(gateway, prompt="a", prompt_logprobs=3, echo=True, logprobs=1, max_tokens=1)["choices"][
        0
    ]
    assert choice["prompt_logprobs"] == [None]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25]


def test_scores_as_an_evaluation_reads_them(gateway: GatewayProcess) -> None:
    """Sums over the continuation, and whether it is what greedy decoding would have said."""
    context, continuation = b"Q: ", b"yz"
    body = {"prompt": [[*context, *continuation]], "max_tokens": 1, "logprobs": 1, "echo": True}
    found = complete(gateway, **body, temperature=0, seed=1234)["choices"][0]["logprobs"]
    part = slice(len(context), -1)
    assert math.isclose(sum(found["token_logprobs"][part]), -0.25 - 9999.0)
    best = [max(top.values()) for top in found["top_logprobs"][part]]
    assert [value == top for value, top in zip(found["token_logprobs"][part], best, strict=True)] == [
        True,
        False,
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_token_ids_come_beside_texts_when_asked_for(
    gateway: GatewayProcess, scheduler: FakeScheduler, path: str, streaming: bool
) -> None:
    body = {"prompt": "say:hey", "messages": user("say:hey"), "return_token_ids": True}
    if streaming:
        chunks = stream(gateway, path, **body)
        ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())]
        first = chunks[0] if path == CHAT else chunks[0]["choices"][0]
        assert all("prompt_token_ids" not in str(chunk) for chunk in chunks[1:])
    else:
        answer = post(gateway, path, body).json()
        ids = answer["choices"][0]["token_ids"]
        first = answer if path == CHAT else answer["choices"][0]
    assert ids == list(b"hey")
    assert first["prompt_token_ids"] == scheduler.prompts[-1]


def test_a_bad_combination_is_refused(gateway: GatewayProcess) -> None:
    body = {"prompt": "x", "prompt_logprobs": 1, "stream": True}
    assert error(post(gateway, COMPLETIONS, body), 400)["param"] == "prompt_logprobs"
