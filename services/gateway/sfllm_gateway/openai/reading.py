"""How a chat's answer is read: what tells its parts apart, and what its grammar must leave room for."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from typing import NamedTuple, Protocol

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai.answer_grammar import Thinking
from sfllm_gateway.openai.reasoning import begins_inside
from sfllm_gateway.openai.tools import Calls, ToolFields, calls_of
from sfllm_gateway.parsing.deltas import OutputParser, PlainParser
from sfllm_gateway.parsing.formats import CallFormat
from sfllm_gateway.parsing.think import CLOSER, OPENER, ThinkParser
from sfllm_gateway.parsing.tool_calls import MAX_CALLS, ToolCallParser

ID_DIGITS = 24


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
    def marks(self) -> frozenset[str]:
        """What may be special tokens of the model, which must not be left out of the text that is read."""
        calls = frozenset() if self.calls is None else self.form.marks
        return calls | {OPENER, CLOSER} if self.thinking.possible else calls

    def parsers(self, prompt: array[int]) -> Callable[[str], OutputParser] | None:
        """What makes a parser for a choice of that name; None where all is content."""
        if self.calls is None and not self.thinking.possible:
            return None
        digest = hashlib.sha256(prompt.tobytes()).digest()
        return lambda name: self._parser(digest + name.encode())

    def _parser(self, name: bytes) -> OutputParser:
        calls, thinking = self.calls, self.thinking
        parser: OutputParser = PlainParser()
        if calls is not None:
            most = MAX_CALLS if calls.parallel and not calls.named else 1
            parser = ToolCallParser(
                self.form, calls.names, lambda number: call_id(name, number), calls.named, most
            )
        if thinking.possible:
            parser = ThinkParser(parser, thinking.inside, self.hides_thinking)
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


def call_id(name: bytes, number: int) -> str:
    """The id of a call of the choice `name`: the same when a request is sent again, and else new.

    A client may give all requests of a conversation the same id, so names have the prompt in them.
    """
    return f"call_{hashlib.sha256(b'%s %d' % (name, number)).hexdigest()[:ID_DIGITS]}"
