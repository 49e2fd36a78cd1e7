from __future__ import annotations

from typing import Any

import pytest

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.prompt import PromptTemplate, template_messages


def render(source: str, messages: list[dict[str, Any]], **keywords: Any) -> str:
    return PromptTemplate(source, {"bos_token": "<s>"}).render(messages, **keywords)


MESSAGES = [{"role": "user", "content": "hi"}]


def test_blocks_leave_no_blank_lines_and_loop_controls_work() -> None:
    source = (
        "{{ bos_token }}\n{% for m in messages %}\n    {% if m.role == 'tool' %}{% break %}{% endif %}\n"
        "{{ m.content }}\n{% endfor %}"
    )
    assert render(source, [*MESSAGES, {"role": "tool", "content": "x"}]) == "<s>\nhi\n"


def test_tojson_escapes_nothing_for_html() -> None:
    assert render("{{ messages | tojson }}", [{"content": "<é&'>"}]) == '[{"content": "<é&\'>"}]'


def test_generation_blocks_show_their_content() -> None:
    assert render("a{% generation %}b{% endgeneration %}c", MESSAGES) == "abc"


def test_the_template_arguments_of_a_request_reach_it() -> None:
    assert render("{{ enable_thinking }}", MESSAGES, extra={"enable_thinking": False}) == "False"


def test_arguments_cannot_replace_the_messages() -> None:
    assert render("{{ messages[0].content }}", MESSAGES, extra={"messages": []}) == "hi"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at.all }}",
    ],
)
def test_what_a_template_refuses_is_a_400(source: str) -> None:
    with pytest.raises(ServiceError) as refused:
        render(source, MESSAGES)
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert refused.value.param == "messages"


def test_the_final_message_is_left_open() -> None:
    source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    messages = [*MESSAGES, {"role": "assistant", "content": " so far "}]
    assert render(source, messages, continue_final_message=True) == "[hi][so far"
    with pytest.raises(ServiceError):
        render("{{ bos_token }}", messages, continue_final_message=True)


def test_arguments_of_tool_calls_become_objects_and_parts_become_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    broken = {"id": "2", "type": "function", "function": {"name": "f", "arguments": "{"}}
    found = template_messages(
        [
            {"role": "assistant", "content": None, "tool_calls": [call, broken]},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]
    )
    assert found[0]["content"] == ""
    assert found[0]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert found[0]["tool_calls"][1]["function"]["arguments"] == "{"
    assert found[1]["content"] == "a\nb"
