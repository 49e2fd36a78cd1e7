"""What clients get from a real gateway process: text, choices, stops, usage and the events' bytes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fake_scheduler import END_TOKEN, FakeScheduler
from gateway_process import GatewayProcess
from http_client import complete, error, events, finish_reasons, post, stream, text_of

from sfllm.messages import Cancel, Submit

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def submits(scheduler: FakeScheduler) -> list[Submit]:
    return [message for message in scheduler.seen if isinstance(message, Submit)]


def test_a_chat_is_answered_in_openais_shape(gateway: GatewayProcess) -> None:
    answer = post(gateway, CHAT, {"messages": user("say:grüß €😀")}).json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", answer.pop("id"))
    assert isinstance(answer.pop("created"), int)
    assert answer.pop("system_fingerprint").startswith("sfllm-")
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "grüß €😀", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 37,
            "completion_tokens": 14,
            "total_tokens": 51,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_the_model_sees_what_the_chat_template_makes(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    post(gateway, CHAT, {"messages": messages, "max_tokens": 1})
    post(
        gateway,
        CHAT,
        {
            "messages": [*user("q"), {"role": "assistant", "content": "so far"}],
            "continue_final_message": True,
            "max_tokens": 1,
        },
    )
    assert len(scheduler.wait_for(Submit, 2)) == 2
    assert complete(gateway, prompt="ab")["usage"]["prompt_tokens"] == 2
    first = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    second = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nso far"
    specials = {b"<|im_start|>": 256, b"<|im_end|>": 257}
    for text, prompt in zip((first, second), scheduler.prompts, strict=False):
        pieces = re.split(rb"(<\|im_start\|>|<\|im_end\|>)", text.encode())
        assert prompt == [
            token for piece in pieces for token in ([specials[piece]] if piece in specials else piece)
        ]


def test_the_bytes_of_a_chat_stream_are_these(gateway: GatewayProcess) -> None:
    fields = {"messages": user("say:hi"), "stream": True, "stream_options": {"include_usage": True}}
    body = post(gateway, CHAT, fields).content.decode()
    head = re.match(r'data: (\{"id":"chatcmpl-[0-9a-f]{32}",.*?"system_fingerprint":"[^"]+",)', body)
    assert head is not None
    pieces = [line.removeprefix("data: ").removeprefix(head[1]) for line in body.split("\n\n")]
    role = '"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
    assert pieces[0] == role + '"finish_reason":null}],"usage":null}'
    usage = '"prompt_tokens":25,"completion_tokens":2,"total_tokens":27,'
    details = '"prompt_tokens_details":{"cached_tokens":0}'
    assert pieces[-3:] == ['"choices":[],"usage":{' + usage + details + "}}", "[DONE]", ""]
    for piece in pieces[1:-3]:
        assert re.fullmatch(
            r'"choices":\[\{"index":0,"delta":(\{\}|\{"content":"\w+"\}),"logprobs":null,'
            r'"finish_reason":(null|"stop")\}\],"usage":null\}',
            piece,
        )


@pytest.mark.parametrize("tokens_per_message", [1, 3, 50])
def test_a_stream_adds_up_to_the_whole_answer_and_ends_once_per_choice(
    gateway: GatewayProcess, scheduler: FakeScheduler, tokens_per_message: int
) -> None:
    scheduler.script.tokens_per_message = tokens_per_message
    chunks = stream(gateway, CHAT, messages=user("say:ä€😀 done"), n=3)
    for index in range(3):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in mine[1:])
        assert all(choice["delta"].get("content") for choice in mine[1:-1])
        assert text_of(chunks, index) == "ä€😀 done"
        assert finish_reasons(chunks, index) == ["stop"]
        assert mine[-1]["finish_reason"] == "stop"
    assert all("\ufffd" not in str(chunk) for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_several_prompts_with_n_choices_each_are_numbered_prompt_by_prompt(gateway: GatewayProcess) -> None:
    answer = complete(gateway, prompt=["say:one", "say:two"], n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["one", "one", "two", "two"]
    assert answer["usage"]["prompt_tokens"] == 14
    assert answer["usage"]["completion_tokens"] == 12
    chunks = stream(gateway, COMPLETIONS, prompt=["say:one", "say:two"], n=2)
    assert [text_of(chunks, index) for index in range(4)] == ["one", "one", "two", "two"]


@pytest.mark.parametrize("prompt", [[97, 98], [[97, 98]], "ab", ["ab"]])
def test_a_prompt_may_be_text_or_token_ids(
    gateway: GatewayProcess, scheduler: FakeScheduler, prompt: Any
) -> None:
    assert complete(gateway, prompt=prompt, max_tokens=3)["choices"][0]["text"] == "abc"
    assert scheduler.prompts[-1] == [97, 98]


@pytest.mark.parametrize("tokens_per_message", [1, 4, 50])
@pytest.mark.parametrize(
    ("fields", "text", "tokens"),
    [
        ({"stop": "efg"}, "abcd", 7),
        ({"stop": "efg", "include_stop_str_in_output": True}, "abcdefg", 7),
        ({"stop": ["zz", "hi", "gh"]}, "abcdef", 8),
        ({"stop": "a", "min_tokens": 5, "max_tokens": 30}, "abcdefghijklmnopqrstuvwxyz", 27),
        ({"stop": "cdx"}, "abcdefghijkl", 12),
        ({"stop": "kl", "max_tokens": 12}, "abcdefghij", 12),
        ({"stop_token_ids": [ord("d")]}, "abc", 3),
    ],
)
def test_stops_across_token_boundaries(
    gateway: GatewayProcess,
    scheduler: FakeScheduler,
    fields: dict[str, Any],
    text: str,
    tokens: int,
    tokens_per_message: int,
) -> None:
    scheduler.script.tokens_per_message = tokens_per_message
    fields = {"prompt": "x", "max_tokens": 12, **fields}
    reason = "length" if fields.get("stop") == "cdx" else "stop"
    answer = complete(gateway, **fields)
    assert answer["choices"][0]["text"] == text
    assert answer["choices"][0]["finish_reason"] == reason
    assert answer["usage"]["completion_tokens"] == tokens
    chunks = stream(gateway, COMPLETIONS, **fields, stream_options={"include_usage": True})
    assert text_of(chunks) == text
    assert finish_reasons(chunks) == [reason]
    assert chunks[-1]["usage"]["completion_tokens"] == tokens


def test_a_stop_string_cancels_what_the_worker_still_does(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    scheduler.script.pause_at = 8
    complete(gateway, prompt="x", stop="cd", max_tokens=400)
    cancel = scheduler.wait_for(Cancel)[0]
    assert isinstance(cancel, Cancel)
    assert cancel.reason == "stop"


def test_bytes_that_are_no_text_become_replacements_at_the_end(gateway: GatewayProcess) -> None:
    prompt = [*b"say:", 0xE2, 0x82]
    assert complete(gateway, prompt=prompt)["choices"][0]["text"] == "\ufffd"
    assert text_of(stream(gateway, COMPLETIONS, prompt=prompt)) == "\ufffd"


@pytest.mark.parametrize(("fields", "text"), [({}, "hi"), ({"skip_special_tokens": False}, "hi")])
def test_the_stop_token_is_no_part_of_the_output(
    gateway: GatewayProcess, fields: dict[str, Any], text: str
) -> None:
    assert complete(gateway, prompt="say:hi", **fields)["choices"][0]["text"] == text


def test_ignored_ends_are_shown_only_with_special_tokens(gateway: GatewayProcess) -> None:
    fields = {"prompt": "say:hi", "ignore_eos": True, "max_tokens": 3}
    assert complete(gateway, **fields)["choices"][0]["text"] == "hi"
    assert complete(gateway, **fields, skip_special_tokens=False)["choices"][0]["text"] == "hi<|im_end|>"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 16),
        ({"max_tokens": 3}, 3),
        ({"max_new_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 5}, 5),
        ({"max_tokens": 10**30}, 511),
    ],
)
def test_max_tokens_in_its_spellings_and_clamped_to_the_room(
    gateway: GatewayProcess, scheduler: FakeScheduler, fields: dict[str, Any], expected: int
) -> None:
    scheduler.script.tokens_per_message = 600
    assert complete(gateway, prompt="x", **fields)["usage"]["completion_tokens"] == expected
    assert submits(scheduler)[-1].sampling.max_tokens == expected


def test_sampling_reaches_the_scheduler_as_it_was_asked_for(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -5}
    complete(gateway, prompt="x", **wanted, priority=-3, min_tokens=2, ignore_eos=True)
    submit = submits(scheduler)[0]
    assert {name: getattr(submit.sampling, name) for name in wanted} == wanted
    assert (submit.priority, submit.sampling.min_tokens, submit.sampling.ignore_eos) == (-3, 2, True)


def test_almost_no_temperature_is_greedy_and_a_seed_is_drawn(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    complete(gateway, prompt=["x", "x"], temperature=1e-6, top_k=-1, top_p=None, n=None)
    first, second = (submit.sampling for submit in submits(scheduler))
    assert (first.temperature, first.top_k, first.top_p) == (0.0, 0, 1.0)
    assert first.seed != second.seed


def test_usage_is_on_every_chunk_when_asked_for(gateway: GatewayProcess) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(gateway, COMPLETIONS, prompt="x", max_tokens=3, stream_options=options)
    assert all(chunk["usage"]["prompt_tokens"] == 1 for chunk in chunks)
    assert chunks[-1]["usage"]["total_tokens"] == 4


def test_without_stream_options_no_chunk_has_usage(gateway: GatewayProcess) -> None:
    assert all("usage" not in chunk for chunk in stream(gateway, COMPLETIONS, prompt="x"))


@pytest.mark.parametrize("model", ["tiny", "tiny-alias", None])
def test_a_model_answers_to_all_its_names_and_to_none(gateway: GatewayProcess, model: str | None) -> None:
    assert complete(gateway, model=model, prompt="say:x")["model"] == "tiny"


def test_the_native_api_answers_text_ids_and_meta(gateway: GatewayProcess) -> None:
    answer = post(gateway, "/generate", {"text": "say:hey", "rid": "mine"}).json()
    assert answer["text"] == "hey"
    assert answer["output_ids"] == list(b"hey")
    meta = answer["meta_info"]
    assert meta.pop("e2e_latency") > 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "stop", "matched": END_TOKEN},
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "cached_tokens": 0,
    }


def test_the_native_api_streams_cumulative_text(gateway: GatewayProcess) -> None:
    params = {"max_new_tokens": 6, "stop": "ef", "temperature": 0}
    body = {"input_ids": [97], "sampling_params": params, "stream": True}
    chunks = events(post(gateway, "/generate", body))
    texts = [chunk["text"] for chunk in chunks]
    assert texts[-1] == "abcd"
    assert all("abcd".startswith(text) for text in texts)
    assert [chunk["meta_info"]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": "ef"}
    assert chunks[-1]["output_ids"] == list(b"abcdef")


def test_the_native_api_gives_a_list_for_several_choices(gateway: GatewayProcess) -> None:
    answer = post(gateway, "/generate", {"text": "x", "sampling_params": {"n": 2, "max_new_tokens": 2}})
    assert [item["text"] for item in answer.json()] == ["ab", "ab"]
    assert answer.json()[0]["meta_info"]["finish_reason"] == {"type": "length", "length": 2}


def test_unknown_fields_are_named_and_counted(gateway: GatewayProcess) -> None:
    before = gateway.metric("ignored_fields_total")
    body = {"prompt": "x", "zebra": 1, "ape": {}, "bad name\r\nx: y": 2, "metadata": {}, "logit_bias": None}
    answer = post(gateway, COMPLETIONS, body)
    assert answer.headers["X-Sfllm-Ignored-Fields"] == "ape, zebra"
    assert gateway.metric("ignored_fields_total") == before + 3


def test_the_request_id_is_echoed(gateway: GatewayProcess) -> None:
    headers = {"X-Request-Id": "abc-1"}
    assert post(gateway, COMPLETIONS, {"prompt": "x"}, headers=headers).headers["X-Request-Id"] == "abc-1"
    answer = post(gateway, COMPLETIONS, {"prompt": "x", "request_id": "body-2"}, headers=headers)
    assert answer.headers["X-Request-Id"] == "body-2"
    bad = post(gateway, COMPLETIONS, {"prompt": "x", "request_id": "a\r\nb: c"})
    assert error(bad, 400)["param"] == "request_id"
    assert len(bad.headers["X-Request-Id"]) == 32
