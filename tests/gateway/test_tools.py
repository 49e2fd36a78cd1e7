"""Tools and reasoning by a real gateway process: what is asked of workers, and how answers are told apart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import openai
import pytest
from fake_scheduler import ASSET_FILES, FakeScheduler, byte_tokenizer, model_card
from gateway_process import GatewayProcess
from http_client import error, events, post
from llguidance import LLMatcher, LLTokenizer

from sfllm.asset_pull import asset_of
from sfllm.messages import ModelState, Submit

Many = tuple[GatewayProcess, FakeScheduler]

CHAT = "/v1/chat/completions"
ECHO = "say:{{ messages[-1].content }}"
TEMPLATES = {
    "hermes": "{% if tools %}<tool_call>{% endif %}" + ECHO,
    "llama": "{% if tools %}<|python_tag|>{% endif %}" + ECHO,
    "thinking": "{% if tools %}{% endif %}{% set t = '</think>' %}" + ECHO,
    "inside": "{% if tools %}{% endif %}{% set t = '</think>' %}" + ECHO + "|<think>\n",
    "effort": "{% set t = '</think>' %}say:{{ reasoning_effort }} {{ enable_thinking }}",
    "llama history": "{% if tools %}{% set t = '<|python_tag|>' %}{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.tool_calls | length }} {% endfor %}",
    "mistral history": "{% if tools %}{% set t = '[TOOL_CALLS]' %}{% endif %}{% for m in messages %}"
    "{% for c in m.tool_calls %}{{ c.id }} {% endfor %}{{ m.tool_call_id }} {% endfor %}",
    "plain": "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}",
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Of a city", "parameters": PARAMETERS},
    },
    {"type": "function", "function": {"name": "stop"}},
]
BAD_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TOKENIZER = LLTokenizer(byte_tokenizer().to_str(), eos_token=[257])


@pytest.fixture(scope="module")
def many() -> Iterator[Many]:
    scheduler = FakeScheduler()
    scheduler.files |= {
        asset_of("chat_template.jinja", text.encode()).sha256: text.encode() for text in TEMPLATES.values()
    }
    states = []
    for name, text in TEMPLATES.items():
        files = {**ASSET_FILES, "chat_template.jinja": text.encode()}
        assets = tuple(asset_of(file, content) for file, content in files.items())
        states.append(ModelState(msgspec.structs.replace(model_card(name, ()), assets=assets), 1))
    scheduler.models = tuple(states)
    gateway = GatewayProcess(scheduler)
    try:
        gateway.wait_ready()
        for name in TEMPLATES:
            gateway.wait_until(lambda name=name: post(gateway, "/tokenize", {"model": name, "prompt": ""}).ok)
        yield gateway, scheduler
    finally:
        code, log = gateway.stop()
        scheduler.close()
    assert code == 0, log


def ask(many: Many, model: str, said: str, **fields: Any) -> Any:
    """The choice that answers with what was said."""
    body = {"model": model, "messages": [{"role": "user", "content": said}], **fields}
    answer = post(many[0], CHAT, body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def streamed(many: Many, model: str, said: str, **fields: Any) -> Any:
    """The same, put together from a stream."""
    body = {"model": model, "messages": [{"role": "user", "content": said}], "stream": True, **fields}
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason = None
    with post(many[0], CHAT, body, stream=True) as answer:
        for event in events(answer):
            (choice,) = event["choices"]
            delta = choice["delta"]
            assert delta or choice["finish_reason"], "no event is empty"
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content", "")
            for part in delta.get("tool_calls", ()):
                if "id" in part:
                    assert part["index"] == len(message["tool_calls"])
                    message["tool_calls"].append(
                        {"id": part["id"], "type": part["type"], "function": part["function"]}
                    )
                else:
                    message["tool_calls"][part["index"]]["function"]["arguments"] += part["function"][
                        "arguments"
                    ]
            reason = choice["finish_reason"] or reason
    return {"message": message, "finish_reason": reason}


def grammar_of(many: Many, model: str, **fields: Any) -> str:
    many[1].seen.clear()
    ask(many, model, "x", **fields)
    (submit,) = [message for message in many[1].seen if isinstance(message, Submit)]
    return submit.sampling.grammar


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return bool(matcher.consume_tokens(list(text.encode()))) and matcher.is_accepting()


@pytest.mark.parametrize("ask_for", [ask, streamed])
def test_calls_are_found_in_what_a_model_writes(many: Many, ask_for: Any) -> None:
    choice = ask_for(many, "hermes", f"Let me see.\n{CALL}\n{CALL}", tools=TOOLS)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    function = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    assert [call["function"] for call in calls] == [function] * 2
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
    assert calls[0]["id"] != calls[1]["id"]


def test_ids_of_calls_follow_from_the_request_and_its_prompt(many: Many) -> None:
    def ids(ask_for: Any, said: str, **fields: Any) -> list[str]:
        choice = ask_for(many, "hermes", said, tools=TOOLS, **fields)
        return [call["id"] for call in choice["message"]["tool_calls"]]

    first = ids(ask, CALL + CALL, request_id="turn")
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", name) for name in first)
    assert first == ids(ask, CALL + CALL, request_id="turn") == ids(streamed, CALL + CALL, request_id="turn")
    others = ids(ask, "Hm. " + CALL, request_id="turn") + ids(ask, CALL) + ids(ask, CALL)
    assert len({*first, *others}) == 5, "another prompt or request has others"


def test_one_call_is_found_where_only_one_is_wanted(many: Many) -> None:
    choice = ask(many, "hermes", f"{CALL}\n{CALL}", tools=TOOLS, parallel_tool_calls=False)
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"


def test_a_schema_that_cannot_be_enforced_is_shown_where_nothing_is_enforced(many: Many) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": odd}}]
    assert ask(many, "hermes", CALL, tools=tools)["finish_reason"] == "tool_calls"
    body = {"model": "hermes", "messages": [{"role": "user", "content": "x"}], "tools": tools}
    refused = error(post(many[0], CHAT, {**body, "tool_choice": "required"}), 400)
    assert refused["param"] == "tools[0].function.parameters"


def test_a_message_of_calls_alone_has_no_content(many: Many) -> None:
    assert ask(many, "hermes", CALL, tools=TOOLS)["message"]["content"] is None


@pytest.mark.parametrize(
    "fields", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}, {"tools": TOOLS[1:]}]
)
def test_without_such_a_tool_to_call_everything_is_content(many: Many, fields: dict[str, Any]) -> None:
    choice = ask(many, "hermes", CALL, **fields)
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


@pytest.mark.parametrize("ask_for", [ask, streamed])
def test_a_call_that_is_cut_off_ends_with_length(many: Many, ask_for: Any) -> None:
    choice = ask_for(many, "hermes", CALL, tools=TOOLS, max_tokens=len(CALL) - 20)
    assert choice["finish_reason"] == "length"
    assert len(choice["message"].get("tool_calls", ())) == (ask_for is streamed)


@pytest.mark.parametrize("ask_for", [ask, streamed])
@pytest.mark.parametrize(
    ("model", "said"), [("thinking", "<think>\nHm.\n</think>\n\nYes."), ("inside", "Hm.\n</think>\n\nYes.")]
)
def test_reasoning_is_told_from_content(many: Many, ask_for: Any, model: str, said: str) -> None:
    message = ask_for(many, model, said)["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    hidden = ask_for(many, model, said, include_reasoning=False)["message"]
    assert (hidden.get("reasoning_content", ""), hidden["content"]) == ("", "Yes.")


@pytest.mark.parametrize("tokens_per_message", [1, 7, 500])
@pytest.mark.parametrize(
    ("model", "thinking"),
    [("thinking", "<think>Hm, €.</think>"), ("inside", "Hm, €.</think>"), ("hermes", "")],
)
def test_tokens_of_reasoning_are_counted(
    many: Many, tokens_per_message: int, model: str, thinking: str
) -> None:
    many[1].script.tokens_per_message = tokens_per_message
    tokens = len(thinking.encode())
    body = {
        "model": model,
        "messages": [{"role": "user", "content": thinking + "Yes."}],
        "tools": TOOLS,
        "n": 2,
    }
    for fields in ({}, {"include_reasoning": False}, {"logprobs": True}):
        usage = post(many[0], CHAT, {**body, **fields}).json()["usage"]
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 2 * tokens}
    options = {"include_usage": True, "continuous_usage_stats": True}
    with post(many[0], CHAT, {**body, "stream": True, "stream_options": options}, stream=True) as answer:
        usages = [event["usage"] for event in events(answer) if event["usage"]]
    assert usages[-1]["completion_tokens_details"] == {"reasoning_tokens": 2 * tokens}
    assert usages[-2]["completion_tokens_details"] == {"reasoning_tokens": tokens}
    asked = {"model": model, "input": thinking + "Yes."}
    usage = post(many[0], "/v1/responses", asked).json()["usage"]
    assert usage["output_tokens_details"] == {"reasoning_tokens": tokens}
    many[1].script.tokens_per_message = 1


def test_reasoning_and_calls_may_both_be_there(many: Many) -> None:
    choice = ask(many, "thinking", f"<think>I call.</think>{CALL}", tools=TOOLS)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == "I call."
    assert len(choice["message"]["tool_calls"]) == 1


def test_log_probabilities_of_tokens_that_were_held_back_are_not_lost(
    many: Many,
) -> None:
    body = {"model": "hermes", "messages": [{"role": "user", "content": "a <tool b"}], "tools": TOOLS}
    with post(many[0], CHAT, {**body, "stream": True, "logprobs": True}, stream=True) as answer:
        parts = [event["choices"][0]["logprobs"] for event in events(answer)]
    tokens = [item["token"] for part in parts if part for item in part["content"]]
    assert "".join(tokens) == "a <tool b"


@pytest.mark.parametrize(
    ("effort", "said"),
    [(None, " "), ("none", "none False"), ("low", "low True"), ("xhigh", "xhigh True")],
)
def test_effort_reaches_the_template(many: Many, effort: str | None, said: str) -> None:
    assert ask(many, "effort", "x", reasoning_effort=effort)["message"]["content"] == said


def test_a_call_that_must_be_made_has_a_grammar(many: Many) -> None:
    grammar = grammar_of(many, "hermes", tools=TOOLS, tool_choice="required")
    other = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    assert accepts(grammar, CALL)
    assert accepts(grammar, f"{CALL}\n{other}")
    for wrong in ("Oslo", CALL.replace('"Oslo"', "5"), CALL.replace("get_weather", "get"), f"{CALL} and"):
        assert not accepts(grammar, wrong)
    single = grammar_of(many, "hermes", tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert accepts(single, CALL)
    assert not accepts(single, f"{CALL}\n{other}")


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "stop"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "stop"}}],
            },
        },
    ],
)
def test_a_named_call_is_of_that_function(many: Many, choice: Any) -> None:
    grammar = grammar_of(many, "hermes", tools=TOOLS, tool_choice=choice)
    assert accepts(grammar, '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>')
    assert not accepts(grammar, CALL)


def test_each_family_gets_the_grammar_of_its_own_form(many: Many) -> None:
    grammar = grammar_of(many, "llama", tools=TOOLS, tool_choice="required")
    assert accepts(grammar, '{"name": "get_weather", "parameters": {"city": "Oslo"}}')
    assert not accepts(grammar, CALL)


def test_thinking_stays_free_before_a_form_and_before_calls(
    many: Many,
) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS}}
    for model, before in (("thinking", "<think>\nHm, <b> {.\n</think>\n\n"), ("inside", "Hm.</think>\n")):
        grammar = grammar_of(many, model, response_format=wanted)
        assert accepts(grammar, before + '{"city": "Oslo"}')
        assert not accepts(grammar, before + "Oslo")
        assert accepts(grammar_of(many, model, tools=TOOLS, tool_choice="required"), before + CALL)
        own = grammar_of(many, model, structured_outputs={"grammar": 'start: "x"'})
        assert accepts(own, before + "x")
        assert not accepts(own, before + "y")


def test_beside_tools_an_answer_is_of_its_form_or_a_call(many: Many) -> None:
    for fields, right in (
        ({"response_format": {"type": "json_object"}}, '{"a": 1}'),
        ({"structured_outputs": {"regex": r"\d+/\d+"}}, "22/7"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no"),
        ({"structured_outputs": {"grammar": 'start: "x" "y"?'}}, "xy"),
    ):
        grammar = grammar_of(many, "hermes", tools=TOOLS, **fields)
        assert accepts(grammar, right)
        assert accepts(grammar, CALL)
        assert not accepts(grammar, "Oslo")


def test_arguments_are_an_object_whatever_a_schema_leaves_open(many: Many) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    grammar = grammar_of(many, "llama", tools=tools, tool_choice="required")
    assert accepts(grammar, '{"name": "f", "parameters": {"a": 1}}')
    assert not accepts(grammar, '{"name": "f", "parameters": 5}')


def test_histories_are_told_as_each_family_takes_them(many: Many) -> None:
    calls = [{"id": f"call_{n}", "type": "function", "function": {"name": "stop"}} for n in range(2)]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "I stop.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    ask(many, "llama history", "", messages=messages, tools=TOOLS[1:], max_tokens=1)
    assert bytes(many[1].prompts[-1]).decode() == "user:0 assistant:1 assistant:1 tool:0 "
    ask(many, "mistral history", "", messages=messages, tools=TOOLS[1:], max_tokens=1)
    shown = bytes(many[1].prompts[-1]).decode().split()
    assert [len(name) for name in shown] == [9, 9, 9]
    assert shown[0] != shown[1] == shown[2]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "go"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {
                "tools": [
                    TOOLS[1],
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}},
                ],
                "tool_choice": "required",
            },
            "tools[1].function.parameters",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
                ]
            },
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(many: Many, fields: dict[str, Any], param: str) -> None:
    body = {"model": "hermes", "messages": [{"role": "user", "content": "x"}], **fields}
    assert error(post(many[0], CHAT, body), 400)["param"] == param


def test_a_template_that_knows_no_tools_gets_them_in_a_system_message(
    many: Many,
) -> None:
    ask(many, "plain", "hello", tools=TOOLS[1:], max_tokens=1)
    shown = bytes(many[1].prompts[-1]).decode()
    assert shown.startswith("system=You can call functions")
    assert '"name":"stop"' in shown
    assert shown.endswith("user=hello;")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
    ask(many, "plain", "", messages=messages, tools=TOOLS[1:], max_tokens=1)
    assert bytes(many[1].prompts[-1]).decode().startswith("system=Be kind.\n\nYou can call functions")


def test_the_openai_client_streams_calls(many: Many) -> None:
    client = openai.OpenAI(base_url=many[0].url + "/v1", api_key="none", max_retries=0)
    with client.chat.completions.stream(
        model="hermes", messages=[{"role": "user", "content": CALL}], tools=TOOLS
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Oslo"}


def test_calls_are_left_alone_where_the_operator_says_so() -> None:
    scheduler = FakeScheduler()
    gateway = GatewayProcess(scheduler, "--tool-call-parser=none", "--reasoning-parser=think")
    try:
        gateway.wait_ready()
        asked = {"messages": [{"role": "user", "content": "say:<think>a</think>b"}], "tools": TOOLS}
        answer = post(gateway, CHAT, asked)
        assert answer.json()["choices"][0]["message"]["reasoning_content"] == "a"
        assert error(post(gateway, CHAT, {**asked, "tool_choice": "required"}), 501)["param"] == "tool_choice"
    finally:
        code, log = gateway.stop()
        scheduler.close()
    assert code == 0, log
