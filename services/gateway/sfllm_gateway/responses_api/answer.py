"""Answers of `POST /v1/responses`: the response, and the events of its stream.

A stream ends with the event that has the whole response, whether it is completed, incomplete or failed;
there is no other end mark.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.generation import Generation, Update, Usage
from sfllm_gateway.logprobs import TokenReport
from sfllm_gateway.openai.token_json import TokenNames, chat_logprobs
from sfllm_gateway.parsing.deltas import Delta
from sfllm_gateway.parsing.thoughts import ThoughtCounter
from sfllm_gateway.responses_api.fields import Decoded, Reasoning, TextConfig
from sfllm_gateway.responses_api.output import Events, Output
from sfllm_gateway.responses_api.parts import Parts

ID_PREFIX = "resp_"

BUSY = frozenset({ErrorCode.QUEUE_FULL, ErrorCode.RATE_LIMIT_EXCEEDED})

_encode = msgspec.json.Encoder().encode


class ResponsesAnswer:
    """The answer `name` to one request."""

    def __init__(self, name: str, decoded: Decoded, generation: Generation) -> None:
        self._events = Events()
        self._output = Output(name.removeprefix(ID_PREFIX), self._events)
        self._parts = Parts(None if generation.parsers is None else generation.parsers(name))
        text = generation.model.text
        self._names = TokenNames(text.detokenizers.token_bytes)
        self._thoughts = ThoughtCounter(text.detokenizers.token_bytes)
        self._reason = ""
        self._response = _response(name, decoded, generation)

    def first(self, choices: int) -> bytes:  # noqa: ARG002 - a response has one choice
        """The response without output, twice: it is there, and it is worked on."""
        fields = {"response": self._response}
        return self._events.write("response.created", fields) + self._events.write(
            "response.in_progress", fields
        )

    def event(self, update: Update) -> bytes:
        """What the text turned out to be, and the end of the last item with the last of it."""
        return b"".join(self._take(update))

    def last(self, usage: Usage) -> bytes:
        """The whole response."""
        response = self._ended(usage)
        return self._events.write(f"response.{response['status']}", {"response": response})

    def failed(self, error: ServiceError) -> bytes:
        """The response with the error."""
        told = {
            "code": "rate_limit_exceeded" if error.code in BUSY else "server_error",
            "message": error.message,
            "type": error.http.type,
            "param": error.param,
        }
        response = {**self._response, "status": "failed", "error": told, "output": self._output.items}
        return self._events.write("response.failed", {"response": response})

    def whole(self, updates: Sequence[Update], usage: Usage) -> bytes:
        """The response."""
        (update,) = updates
        self._take(update)
        return _encode(self._ended(usage))

    def _take(self, update: Update) -> list[bytes]:
        found: list[bytes] = []
        pieces = list(self._parts.feed(update))
        content, thought = (piece.delta.content for piece in pieces), sum(p.delta.thought for p in pieces)
        self._thoughts.add(update.ids, update.text, Delta("".join(content), thought=thought))
        for piece in pieces:
            found += self._output.feed(piece.delta, self._logprobs(piece.reports))
        if update.finish_reason is None:
            return found
        piece, self._reason = self._parts.finish(update.finish_reason)
        reports = piece.reports
        if piece.delta.content:
            found += self._output.feed(piece.delta, self._logprobs(reports))
            reports = []
        else:
            found += self._output.feed(piece.delta)
        return found + self._output.finish(self._reason == "length", self._logprobs(reports))

    def _logprobs(self, reports: Sequence[TokenReport]) -> list[dict[str, Any]]:
        return chat_logprobs(reports, self._names)["content"] if reports else []

    def _ended(self, usage: Usage) -> dict[str, Any]:
        complete = self._reason != "length"
        return {
            **self._response,
            "status": "completed" if complete else "incomplete",
            "completed_at": int(time.time()) if complete else None,
            "incomplete_details": None if complete else {"reason": "max_output_tokens"},
            "output": self._output.items,
            "usage": self._usage_json(usage),
        }

    def _usage_json(self, usage: Usage) -> dict[str, Any]:
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._thoughts.tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _response(name: str, decoded: Decoded, generation: Generation) -> dict[str, Any]:
    """The response as it is at first: in progress, without output."""
    request = decoded.request
    sampling = generation.samplings[0]
    reasoning = request.reasoning or Reasoning()
    return {
        "id": name,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "frequency_penalty": sampling.frequency_penalty,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": generation.model.card.name,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "presence_penalty": sampling.presence_penalty,
        "previous_response_id": None,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "text": {
            "format": decoded.format,
            "verbosity": (request.text or TextConfig()).verbosity or "medium",
        },
        "tool_choice": request.tool_choice or "auto",
        "tools": decoded.tools,
        "top_logprobs": request.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
    }
