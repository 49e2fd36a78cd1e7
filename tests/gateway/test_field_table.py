"""The table of request fields, row by row: what is asked, and what the worker is told or the answer says.

Refused values are in `test_http_errors.py` and in the second half of the table here; fields that are not
built are in the one table of the package, `openai/unbuilt.py`, and all of them answer 501.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from fake_scheduler import END_TOKEN, FakeScheduler
from gateway_process import GatewayProcess
from http_client import error, events, post

from sfllm.messages import Submit

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "x"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES, "max_tokens": 4},
    COMPLETIONS: {"prompt": "xy", "max_tokens": 4},
}
BOTH = (CHAT, COMPLETIONS)

# What is asked, and which fields of the worker's `Sampling` (or of `Submit`) must be what.
SENT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0}),
    ({}, {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}),
    ({}, {"logit_bias": (), "allowed_token_ids": (), "bad_words": (), "logprobs": -1, "prompt_logprobs": -1}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 1e-6}, {"temperature": 0.0}),
    ({"temperature": 2}, {"temperature": 2.0}),
    ({"top_p": 0.25, "min_p": 0.5}, {"top_p": 0.25, "min_p": 0.5}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"top_k": 5}, {"top_k": 5}),
    ({"top_k": 10**9}, {"top_k": 259}),
    ({"frequency_penalty": -2, "presence_penalty": 2}, {"frequency_penalty": -2.0, "presence_penalty": 2.0}),
    ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    ({"n": 3}, {"choices": (0, 1, 2)}),
    ({"n": 2, "temperature": 0}, {"choices": (0, 1), "temperature": 0.0}),
    ({"max_tokens": 7}, {"max_tokens": 7}),
    ({"max_tokens": None, "max_new_tokens": 7}, {"max_tokens": 7}),
    ({"max_tokens": 7, "max_completion_tokens": 6}, {"max_tokens": 6}),
    ({"min_tokens": 4}, {"min_tokens": 4}),
    ({"ignore_eos": True}, {"ignore_eos": True}),
    ({"stop_token_ids": [3, 4, 3]}, {"stop_token_ids": (3, 4)}),
    ({"allowed_token_ids": [97, 98, 97]}, {"allowed_token_ids": (97, 98)}),
    ({"bad_words": ["ab", "ab", " c"]}, {"bad_words": ((97, 98), (32, 97, 98), (99,), (32, 99))}),
    ({"logit_bias": {"97": -100, "98": 1.5}}, {"logit_bias": ((97, -100.0), (98, 1.5))}),
    ({"seed": -(2**63)}, {"seed": -(2**63)}),
    ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
    ({"prompt_logprobs": 0}, {"prompt_logprobs": 0}),
    ({"prompt_logprobs": 20}, {"prompt_logprobs": 20}),
    ({"priority": -3}, {"priority": -3}),
    ({"cache_salt": "tenant"}, {"cache_salt": "tenant"}),
    ({"stop": ["a"] * 16}, {}),
    ({"user": "somebody", "suffix": "", "response_format": {"type": "text"}}, {}),
]

# Fields of one endpoint.
SENT_BY_ONE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (CHAT, {"max_tokens": None}, {"max_tokens": 512 - 20}),
    (COMPLETIONS, {"max_tokens": None}, {"max_tokens": 16}),
    (COMPLETIONS, {"max_tokens": 10**9}, {"max_tokens": 510}),
    (CHAT, {"logprobs": True}, {"logprobs": 0}),
    (CHAT, {"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
    (CHAT, {"logprobs": False, "top_logprobs": 0}, {"logprobs": -1}),
    (COMPLETIONS, {"logprobs": 0}, {"logprobs": 0}),
    (COMPLETIONS, {"logprobs": 20}, {"logprobs": 20}),
    (COMPLETIONS, {"logprobs": 2, "echo": True}, {"logprobs": 2, "prompt_logprobs": 2, "ignore_eos": False}),
    (COMPLETIONS, {"logprobs": 2, "echo": True, "max_tokens": 1}, {"ignore_eos": True}),
    (COMPLETIONS, {"logprobs": 2, "echo": True, "max_tokens": 0}, {"max_tokens": 1, "prompt_logprobs": 2}),
    (COMPLETIONS, {"logprobs": 2, "echo": True, "prompt_logprobs": 5}, {"logprobs": 2, "prompt_logprobs": 5}),
    (COMPLETIONS, {"prompt": "abcdef", "truncate_prompt_tokens": 2}, {"prompt": b"ef"}),
    (COMPLETIONS, {"prompt": "abcdef", "truncate_prompt_tokens": 9}, {"prompt": b"abcdef"}),
    (
        COMPLETIONS,
        {"prompt": "a" * 510 + "bcd", "truncate_prompt_tokens": -1},
        {"prompt": b"a" * 505 + b"bcd"},
    ),
    (COMPLETIONS, {"prompt": [97, 98]}, {"prompt": b"ab"}),
    (COMPLETIONS, {"prompt": [[97], [98]]}, {"prompt": b"b"}),
    (COMPLETIONS, {"prompt": ["a", "b"]}, {"prompt": b"b"}),
    (CHAT, {"add_generation_prompt": False}, {"prompt_tokens": 9}),
    (CHAT, {"continue_final_message": True}, {"prompt_tokens": 7}),
    (CHAT, {"chat_template_kwargs": {"add_generation_prompt": False}}, {"prompt_tokens": 20}),
]

# What the answer says. The model of these tests writes what the prompt tells it to, else the alphabet.
SAID: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "x", "max_tokens": 3}, "abc", "length"),
    ({"prompt": "say:hi"}, "hi", "stop"),
    ({"prompt": "say:hi", "ignore_eos": True, "max_tokens": 3}, "hi", "length"),
    (
        {"prompt": "say:hi", "ignore_eos": True, "max_tokens": 3, "skip_special_tokens": False},
        "hi<|im_end|>",
        "length",
    ),
    ({"prompt": "x", "stop": "cd"}, "ab", "stop"),
    ({"prompt": "x", "stop": "cd", "include_stop_str_in_output": True}, "abcd", "stop"),
    ({"prompt": "x", "stop": "a", "min_tokens": 2, "max_tokens": 4}, "abcd", "length"),
    ({"prompt": "x", "stop_token_ids": [ord("d")]}, "abc", "stop"),
    ({"prompt": "say:ab", "echo": True}, "say:abab", "stop"),
    ({"prompt": "say:ab", "echo": True, "max_tokens": 0}, "say:ab", "length"),
    ({"prompt": "say:ab", "echo": True, "max_tokens": 0, "truncate_prompt_tokens": 3}, ":ab", "length"),
    ({"prompt": [*b"ab", END_TOKEN], "echo": True, "max_tokens": 0}, "ab", "length"),
    (
        {"prompt": [*b"ab", END_TOKEN], "echo": True, "max_tokens": 0, "skip_special_tokens": False},
        "ab<|im_end|>",
        "length",
    ),
]

# What is refused, and the field that is named. More rows are in `test_http_errors.py`.
REFUSED: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (BOTH, {"frequency_penalty": 2.1}, "frequency_penalty"),
    (BOTH, {"presence_penalty": -2.1}, "presence_penalty"),
    (BOTH, {"repetition_penalty": 0}, "repetition_penalty"),
    (BOTH, {"repetition_penalty": 5e-324}, "repetition_penalty"),
    (BOTH, {"repetition_penalty": 1e300}, "repetition_penalty"),
    (BOTH, {"repetition_penalty": "1"}, "repetition_penalty"),
    (BOTH, {"logit_bias": {"97": 101}}, "logit_bias"),
    (BOTH, {"logit_bias": {"97": None}}, "logit_bias"),
    (BOTH, {"logit_bias": {"259": 1}}, "logit_bias"),
    (BOTH, {"logit_bias": {"-1": 1}}, "logit_bias"),
    (BOTH, {"logit_bias": {"a": 1}}, "logit_bias"),
    (BOTH, {"logit_bias": [1]}, "logit_bias"),
    (BOTH, {"allowed_token_ids": []}, "allowed_token_ids"),
    (BOTH, {"allowed_token_ids": [259]}, "allowed_token_ids"),
    (BOTH, {"allowed_token_ids": [97], "bad_words": ["ba"]}, "allowed_token_ids"),
    (
        BOTH,
        {"allowed_token_ids": [END_TOKEN, 97], "min_tokens": 1, "stop_token_ids": [97]},
        "allowed_token_ids",
    ),
    (BOTH, {"stop_token_ids": [*range(259)], "min_tokens": 1}, "stop_token_ids"),
    (BOTH, {"stop_token_ids": [1, -1]}, "stop_token_ids"),
    (BOTH, {"bad_words": [""]}, "bad_words"),
    (BOTH, {"bad_words": [" "]}, "bad_words"),
    (BOTH, {"bad_words": "word"}, "bad_words"),
    (BOTH, {"bad_words": ["x"] * 513}, "bad_words"),
    (BOTH, {"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    (BOTH, {"prompt_logprobs": -1}, "prompt_logprobs"),
    (BOTH, {"prompt_logprobs": 21}, "prompt_logprobs"),
    (BOTH, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (BOTH, {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    (BOTH, {"cache_salt": ""}, "cache_salt"),
    (BOTH, {"cache_salt": 3}, "cache_salt"),
    (BOTH, {"return_token_ids": 1}, "return_token_ids"),
    ((CHAT,), {"max_tokens": 0}, "max_tokens"),
    ((CHAT,), {"logprobs": 5}, "logprobs"),
    ((CHAT,), {"top_logprobs": 1}, "top_logprobs"),
    ((CHAT,), {"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
    ((CHAT,), {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ((CHAT,), {"truncate_prompt_tokens": 0}, "messages"),
    ((CHAT,), {"chat_template_kwargs": []}, "chat_template_kwargs"),
    ((COMPLETIONS,), {"max_tokens": 0}, "max_tokens"),
    ((COMPLETIONS,), {"max_tokens": 0, "echo": False}, "max_tokens"),
    ((COMPLETIONS,), {"logprobs": True}, "logprobs"),
    ((COMPLETIONS,), {"logprobs": 21}, "logprobs"),
    ((COMPLETIONS,), {"logprobs": -1}, "logprobs"),
    ((COMPLETIONS,), {"truncate_prompt_tokens": 0}, "prompt"),
    ((COMPLETIONS,), {"max_tokens": None, "min_tokens": 17}, "min_tokens"),
]


def check_sent(scheduler: FakeScheduler, expected: dict[str, Any]) -> None:
    submit = scheduler.wait_for(Submit)[-1]
    assert isinstance(submit, Submit)
    told = msgspec.structs.asdict(submit) | msgspec.structs.asdict(submit.sampling)
    prompt = scheduler.prompts[-1]
    told |= {"prompt": prompt, "prompt_tokens": len(prompt)}
    wanted = {name: list(value) if name == "prompt" else value for name, value in expected.items()}
    assert {name: told[name] for name in wanted} == wanted


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(("fields", "expected"), SENT)
def test_a_field_reaches_the_worker(
    gateway: GatewayProcess,
    scheduler: FakeScheduler,
    path: str,
    fields: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    answer = post(gateway, path, {**BODIES[path], **fields})
    assert answer.status_code == 200, answer.text
    assert "X-Sfllm-Ignored-Fields" not in answer.headers
    check_sent(scheduler, expected)


@pytest.mark.parametrize(("path", "fields", "expected"), SENT_BY_ONE)
def test_a_field_of_one_endpoint_reaches_the_worker(
    gateway: GatewayProcess,
    scheduler: FakeScheduler,
    path: str,
    fields: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    scheduler.script.tokens_per_message = 600
    answer = post(gateway, path, {**BODIES[path], **fields})
    assert answer.status_code == 200, answer.text
    assert "X-Sfllm-Ignored-Fields" not in answer.headers
    check_sent(scheduler, expected)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("fields", "text", "reason"), SAID)
def test_a_field_shows_in_the_answer(
    gateway: GatewayProcess, fields: dict[str, Any], text: str, reason: str, streaming: bool
) -> None:
    answer = post(gateway, COMPLETIONS, {**fields, "stream": streaming})
    assert answer.status_code == 200, answer.text
    choices = [chunk["choices"][0] for chunk in (events(answer) if streaming else [answer.json()])]
    assert "".join(choice["text"] for choice in choices) == text
    assert choices[-1]["finish_reason"] == reason


@pytest.mark.parametrize(
    ("path", "fields", "param"), [(path, fields, param) for paths, fields, param in REFUSED for path in paths]
)
def test_a_value_out_of_bounds_is_400_and_names_its_field(
    gateway: GatewayProcess, scheduler: FakeScheduler, path: str, fields: dict[str, Any], param: str
) -> None:
    found = error(post(gateway, path, {**BODIES[path], **fields}), 400)
    assert (found["param"], found["type"]) == (param, "invalid_request_error")
    assert not scheduler.of(Submit)


NATIVE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"frequency_penalty": 1, "presence_penalty": 1}, {"frequency_penalty": 1.0, "presence_penalty": 1.0}),
    (
        {"repetition_penalty": 1.5, "logit_bias": {"3": 4}},
        {"repetition_penalty": 1.5, "logit_bias": ((3, 4.0),)},
    ),
    (
        {"bad_words": ["a"], "allowed_token_ids": [5]},
        {"bad_words": ((97,), (32, 97)), "allowed_token_ids": (5,)},
    ),
    ({"min_new_tokens": 2, "max_new_tokens": 3}, {"min_tokens": 2, "max_tokens": 3}),
]


@pytest.mark.parametrize(("params", "expected"), NATIVE)
def test_the_native_api_takes_the_same_sampling(
    gateway: GatewayProcess, scheduler: FakeScheduler, params: dict[str, Any], expected: dict[str, Any]
) -> None:
    answer = post(gateway, "/generate", {"text": "x", "sampling_params": {"max_new_tokens": 4, **params}})
    assert answer.status_code == 200, answer.text
    check_sent(scheduler, expected)


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"logit_bias": {"x": 1}}, "sampling_params.logit_bias"),
        ({"allowed_token_ids": [300]}, "sampling_params.allowed_token_ids"),
        ({"bad_words": [""]}, "sampling_params.bad_words"),
        ({"min_tokens": 9, "max_new_tokens": 3}, "sampling_params.min_tokens"),
        ({"frequency_penalty": 3}, "sampling_params.frequency_penalty"),
    ],
)
def test_the_native_api_names_a_field_by_its_path(
    gateway: GatewayProcess, params: dict[str, Any], param: str
) -> None:
    found = error(post(gateway, "/generate", {"text": "x", "sampling_params": params}), 400)
    assert found["param"] == param
