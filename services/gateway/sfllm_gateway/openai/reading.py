"""How a chat's answer is read: what tells its parts apart, and what its grammar must leave room for."""

from __future__ import annotations

import secrets
from typing import NamedTuple, Protocol

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai.answer_grammar import Thinking
from sfllm_gateway.openai.reasoning import begins_inside
from sfllm_gateway.openai.tools import Calls, ToolFields, calls_of
from sfllm_gateway.parsing.deltas import OutputParser, PlainParser
from sfllm_gateway.parsing.formats import CallFormat
from sfllm_gateway.parsing.think import ThinkParser
from sfllm_gateway.parsing.tool_calls import ToolCallParser


class ReadingFields(ToolFields, Protocol):
    """The fields of a request that say how its answer is read."""

    include_reasoning: bool | None


class Reading(NamedTuple):
    """What an answer may consist of besides content."""

    calls: Calls | None
    form: CallFormat
    thinking: Thinking
    hides_thinking: bool

    @property
    def needs_special_tokens(self) -> bool:
        """Whether calls begin with a token that is left out of texts otherwise."""
        return self.calls is not None and self.form.special

    @property
    def parsers(self) -> _Parsers | None:
        """What makes a parser for a choice; None where all is content."""
        return _Parsers(self) if self.calls is not None or self.thinking.possible else None


class _Parsers:
    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def __call__(self) -> OutputParser:
        calls, thinking = self._reading.calls, self._reading.thinking
        parser: OutputParser = PlainParser()
        if calls is not None:
            parser = ToolCallParser(self._reading.form, calls.names, _call_id, as_stop=calls.named)
        if thinking.possible:
            parser = ThinkParser(parser, thinking.inside, self._reading.hides_thinking)
        return parser


def reading_of(fields: ReadingFields, prompt: str, model: LoadedModel) -> Reading:
    """How the answer to a prompt is read, by what was asked for and what the model is taught to write.

    Raises 501 for a call that must be made where the operator switched calls off.
    """
    dialect = model.text.dialect
    thinking = Thinking(dialect.thinks, dialect.thinks and begins_inside(prompt))
    calls = calls_of(fields)
    if calls is not None and calls.required and not dialect.calls:
        raise ServiceError(
            ErrorCode.NOT_SUPPORTED, "tool_choice: this server looks for no calls", param="tool_choice"
        )
    return Reading(
        calls if dialect.calls else None, dialect.form, thinking, fields.include_reasoning is False
    )


def _call_id(number: int) -> str:  # noqa: ARG001 - parsers give it
    """An id that no other call of the conversation has."""
    return f"call_{secrets.token_hex(12)}"
