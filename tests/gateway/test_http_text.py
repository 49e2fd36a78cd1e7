"""Tokenizing, what is told of models and of the server, and chat templates, by a real gateway process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import requests
from fake_scheduler import ASSET_FILES, END_TOKEN, TEMPLATE, FakeScheduler, model_card
from gateway_process import GatewayProcess
from http_client import error, post

from sfllm.asset_pull import asset_of
from sfllm.messages import GenerationDefaults, ModelState, Submit

CHAT = "/v1/chat/completions"
SPECIAL = {"<|im_start|>": 256, "<|im_end|>": 257}


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def get(gateway: GatewayProcess, path: str) -> Any:
    answer = requests.get(gateway.url + path, timeout=5)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tokenize(gateway: GatewayProcess, **fields: Any) -> Any:
    answer = post(gateway, "/tokenize", fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_text_is_tokenized(gateway: GatewayProcess) -> None:
    found = tokenize(gateway, prompt="a€", return_token_strs=True)
    assert found == {
        "count": 4,
        "max_model_len": 512,
        "tokens": [97, 0xE2, 0x82, 0xAC],
        "token_strs": ["a", "â", "Ĥ", "¬"],
    }
    assert tokenize(gateway, prompt="")["tokens"] == []
    assert tokenize(gateway, prompt="x")["token_strs"] is None


def test_a_conversation_is_tokenized_as_a_chat_would_be(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    post(gateway, CHAT, {"messages": user("hi"), "max_tokens": 1})
    assert tokenize(gateway, messages=user("hi"))["tokens"] == scheduler.prompts[-1]
    open_end = tokenize(gateway, messages=user("hi"), add_generation_prompt=False)["tokens"]
    assert open_end == scheduler.prompts[-1][: len(open_end)]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": user("x")}, 400, "prompt"),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "x", "model": "nope"}, 404, "model"),
        ("/tokenize", {"messages": user("x"), "chat_template": "{{ 1 }}"}, 501, "chat_template"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [259]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
    ],
)
def test_what_cannot_be_tokenized_is_refused(
    gateway: GatewayProcess, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    assert error(post(gateway, path, body), status)["param"] == param


def test_tokens_become_text_again(gateway: GatewayProcess) -> None:
    answer = post(gateway, "/detokenize", {"tokens": [*"é".encode(), END_TOKEN]})
    assert answer.json() == {"prompt": "é<|im_end|>"}


def test_a_remote_tokenizer_finds_what_it_needs(gateway: GatewayProcess) -> None:
    """What an evaluation asks before it scores: special tokens by name, and their ids by tokenizing."""
    info = get(gateway, "/tokenizer_info")
    assert info["eos_token"] == "<|im_end|>"
    assert info.get("bos_token") is None
    assert info["chat_template"] == TEMPLATE
    assert info["tokenizer_class"]
    assert info["model_max_length"] == 512
    tokens = tokenize(gateway, prompt=info["eos_token"], add_special_tokens=False)["tokens"]
    assert tokens == [END_TOKEN]
    assert get(gateway, "/tokenizer_info?model=tiny-alias") == info
    answer = requests.get(gateway.url + "/tokenizer_info?model=nope", timeout=5)
    assert error(answer, 404)["param"] == "model"


def test_the_server_tells_what_it_is(gateway: GatewayProcess) -> None:
    assert get(gateway, "/load") == {"server_load": 0}
    assert get(gateway, "/get_model_info") == {
        "model_path": "tiny-root",
        "tokenizer_path": "tiny-root",
        "is_generation": True,
        "served_model_name": "tiny",
        "max_model_len": 512,
        "vocab_size": 259,
        "preferred_sampling_params": {},
    }
    info = get(gateway, "/get_server_info")
    assert info["status"] == "ready"
    assert info["models"] == [{"id": "tiny", "aliases": ["tiny-alias"], "max_model_len": 512, "workers": 1}]
    assert info["max_streams"] == 8


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}

TEMPLATES = {
    "plain": "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}",
    "tools": "{{ tools | tojson }}{% for m in messages %}{{ m.tool_calls | tojson }}{% endfor %}",
    "parts": "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}",
    "refusing": "{{ raise_exception('roles must alternate') }}",
    "broken": "{% for %}",
    "failing": "{{ messages[0].nothing.at.all }}",
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "huge": "{{ 'a' * 99999999999 }}",
    "arguments": "{{ greeting }}{{ messages | length }}",
}


@pytest.fixture(scope="module")
def many() -> Iterator[tuple[GatewayProcess, FakeScheduler]]:
    """A gateway in front of one model for each template, and one without."""
    fake = FakeScheduler()
    states = []
    for name in (*TEMPLATES, "none"):
        files = {key: value for key, value in ASSET_FILES.items() if key != "chat_template.jinja"}
        if name in TEMPLATES:
            files["chat_template.jinja"] = TEMPLATES[name].encode()
        assets = tuple(asset_of(file, content) for file, content in files.items())
        fake.files |= {asset_of("", content).sha256: content for content in files.values()}
        defaults = GenerationDefaults(temperature=0.5, top_k=7, repetition_penalty=1.25)
        card = msgspec.structs.replace(model_card(name, ()), assets=assets, defaults=defaults)
        states.append(ModelState(card, 1))
    fake.models = tuple(states)
    process = GatewayProcess(fake)
    process.wait_ready()
    for name in (*TEMPLATES, "none"):
        process.wait_until(lambda name=name: post(process, "/tokenize", {"model": name, "prompt": ""}).ok)
    yield process, fake
    code, log = process.stop()
    fake.close()
    assert code == 0, log
    assert "Traceback" not in log, log


def prompt_of(gateway: GatewayProcess, model: str, **fields: Any) -> str:
    """What a template makes of a chat."""
    tokens = tokenize(gateway, model=model, **fields)["tokens"]
    text: str = post(gateway, "/detokenize", {"model": model, "tokens": tokens}).json()["prompt"]
    return text


def test_a_template_that_knows_no_tools_sees_calls_and_results_as_text(
    many: tuple[GatewayProcess, FakeScheduler],
) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}]},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
    ]
    call = '<tool_call>\n{"name":"f","arguments":{}}\n</tool_call>'
    result = "<tool_response>\nt\n</tool_response>"
    expected = f"system=s;user=a\nb;assistant={call};user={result};"
    assert prompt_of(many[0], "plain", messages=messages) == expected


def test_a_template_that_wants_parts_gets_parts(many: tuple[GatewayProcess, FakeScheduler]) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert prompt_of(many[0], "parts", messages=[*user(parts), *user("c")]) == "[a][b][c]"


def test_a_template_gets_the_requests_arguments(many: tuple[GatewayProcess, FakeScheduler]) -> None:
    fields = {"messages": user("x"), "chat_template_kwargs": {"greeting": "hi", "messages": []}}
    assert prompt_of(many[0], "arguments", **fields) == "hi1"


def test_tools_are_shown_to_a_template_that_knows_them_and_arguments_as_objects(
    many: tuple[GatewayProcess, FakeScheduler],
) -> None:
    gateway, fake = many
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"x": 1}'}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    body = {"model": "tools", "messages": messages, "tools": [TOOL], "max_tokens": 1}
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        assert post(gateway, CHAT, {**body, **choice}).status_code == 200
    shown = bytes(fake.prompts[-1]).decode()
    assert shown.startswith('[{"type": "function", "function": {"name": "look_up"')
    assert '"arguments": {"x": 1}' in shown


@pytest.mark.parametrize(
    ("model", "param", "words"),
    [
        ("none", "model", "has no chat template"),
        ("broken", "model", "has no chat template"),
        ("refusing", "messages", "roles must alternate"),
        ("failing", "messages", "nothing"),
        ("huge", "messages", "MemoryError"),
        ("endless", "messages", "longer than 5 s"),
    ],
)
def test_a_template_that_cannot_render_is_400_with_its_message(
    many: tuple[GatewayProcess, FakeScheduler], model: str, param: str, words: str
) -> None:
    found = error(post(many[0], CHAT, {"model": model, "messages": user("x")}), 400)
    assert found["param"] == param
    assert words in found["message"]
    assert prompt_of(many[0], "plain", messages=user("x")) == "user=x;"


def test_the_models_own_defaults_apply_where_the_request_is_silent(
    many: tuple[GatewayProcess, FakeScheduler],
) -> None:
    gateway, fake = many
    body = {"model": "none", "prompt": "x", "max_tokens": 1, "top_k": 3}
    assert post(gateway, "/v1/completions", body).status_code == 200
    submit = fake.of(Submit)[-1]
    assert isinstance(submit, Submit)
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (0.5, 3, 1.25)
    info = get(gateway, "/get_model_info?model=none")
    assert info["preferred_sampling_params"] == {"temperature": 0.5, "top_k": 7, "repetition_penalty": 1.25}
