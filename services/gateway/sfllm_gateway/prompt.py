"""Chat messages to the text of a prompt, by the model's own Jinja template.

Templates come with models, so they run sandboxed: no attribute tricks, no changes to
what they are given. The helpers are those that Hugging Face's templates expect.
"""

from __future__ import annotations

import datetime
import enum
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

from sfllm.errors import ErrorCode, ServiceError, quote

KEPT_TEMPLATES = 16


class RenderJob(msgspec.Struct, array_like=True):
    """What to render. `special_tokens` are names such as `bos_token` with their text.

    Without `messages` the template is only compiled. `extra` are further variables of the template.
    """

    source: str
    special_tokens: dict[str, str]
    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[dict[str, Any]] | None = None
    extra: dict[str, Any] | None = None


class RenderResult(msgspec.Struct, array_like=True):
    """The prompt's `text`, or why there is none: an `error` in the request's `param`, or in the template."""

    text: str | None
    error: str = ""
    param: str | None = None
    syntax_error: str | None = None


class PromptTemplate:
    """A compiled chat template. `special_tokens` are names such as `bos_token` with their text.

    Raises `jinja2.TemplateSyntaxError` for a template that does not compile.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens
        self.content = content_form(environment.parse(source))

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> str:
        """The prompt. Raises `ServiceError` (400) when the template refuses these messages."""
        shown = template_messages(messages, self.content)
        variables: dict[str, Any] = {"documents": None, **self._special_tokens}
        variables |= extra or {}
        variables |= {"messages": shown, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            text = self._template.render(variables)
        except Exception as error:
            raise ServiceError(
                ErrorCode.INVALID_REQUEST,
                f"the model's chat template refuses these messages: {quote(str(error) or repr(error))}",
                param="messages",
            ) from error
        return _up_to_final_message(text, messages) if continue_final_message else text


@lru_cache(KEPT_TEMPLATES)
def _compiled(source: str, special_tokens: tuple[tuple[str, str], ...]) -> PromptTemplate:
    return PromptTemplate(source, dict(special_tokens))


def render(job: RenderJob) -> RenderResult:
    """What comes of a job."""
    try:
        template = _compiled(job.source, tuple(job.special_tokens.items()))
    except jinja2.TemplateSyntaxError as error:
        reason = str(error)
        return RenderResult(None, f"the model's chat template does not compile: {reason}", "model", reason)
    if job.messages is None:
        return RenderResult("")
    try:
        text = template.render(
            job.messages,
            add_generation_prompt=job.add_generation_prompt,
            continue_final_message=job.continue_final_message,
            tools=job.tools,
            extra=job.extra,
        )
    except ServiceError as error:
        return RenderResult(None, error.message, error.param)
    return RenderResult(text)


class ContentForm(enum.Enum):
    """How a template takes the content of a message."""

    TEXT = enum.auto()
    PARTS = enum.auto()
    EITHER = enum.auto()


def content_form(tree: jinja2.nodes.Template) -> ContentForm:
    """What a template takes: one that loops over the content takes parts, and text too if it tests for it."""
    if not any(_is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For)):
        return ContentForm.TEXT
    tests = {test.name for test in tree.find_all(jinja2.nodes.Test)}
    return ContentForm.EITHER if "string" in tests else ContentForm.PARTS


def _is_content(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Const):
        return bool(node.arg.value == "content")
    return False


def template_messages(
    messages: Sequence[dict[str, Any]], form: ContentForm = ContentForm.TEXT
) -> list[dict[str, Any]]:
    """Messages as templates expect them: content in the form it takes, arguments of tool calls as objects."""
    return [_template_message(message, form) for message in messages]


def _template_message(message: dict[str, Any], form: ContentForm) -> dict[str, Any]:
    found = {name: value for name, value in message.items() if value is not None}
    content = found.get("content", "")
    if isinstance(content, list) and form is ContentForm.TEXT:
        content = "\n".join(part["text"] for part in content)
    elif isinstance(content, str) and form is ContentForm.PARTS:
        content = [{"type": "text", "text": content}] if content else []
    found["content"] = content
    if "tool_calls" in found:
        found["tool_calls"] = [_template_call(call) for call in found["tool_calls"]]
    return found


def _template_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return call  # the model once wrote something that is no JSON: the template gets it as it was
    return {**call, "function": {**function, "arguments": arguments}}


def _up_to_final_message(text: str, messages: Sequence[dict[str, Any]]) -> str:
    """The prompt cut off where the last message's text ends, so that the model writes on."""
    content = messages[-1].get("content") or ""
    final = str(content[-1]["text"] if isinstance(content, list) else content)
    start = text.rfind(final.strip())
    if not final.strip() or start < 0:
        raise ServiceError(
            ErrorCode.INVALID_REQUEST,
            "continue_final_message needs a last message whose text the chat template keeps",
            param="continue_final_message",
        )
    whole = final.lstrip()
    return text[: start + len(whole if text.startswith(whole, start) else final.strip())]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes `<` and `&` for web pages, which a model never saw."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}`: marks what the assistant said, for training; here it shows its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
