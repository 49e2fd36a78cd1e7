"""The OpenAPI document: request bodies from the msgspec structs, and every status that can come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI

from sfllm.errors import HTTP_ERRORS
from sfllm_gateway.anthropic.errors import ERRORS, speaks_anthropic
from sfllm_gateway.client import TIMEOUT_HEADER
from sfllm_gateway.tenant import OPEN_PATHS

REFERENCE = "#/components/schemas/{name}"

ERROR_SCHEMA: dict[str, Any] = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "enum": sorted({entry.type for entry in HTTP_ERRORS.values()})},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"type": "string", "enum": sorted(code.value for code in HTTP_ERRORS)},
            },
        }
    },
}

MESSAGES_ERROR_SCHEMA: dict[str, Any] = {
    "title": "MessagesError",
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"type": "string", "const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {
                "type": {"type": "string", "enum": sorted({entry.type for entry in ERRORS.values()})},
                "message": {"type": "string"},
            },
        },
        "request_id": {"type": "string"},
    },
}

_MEANINGS = {
    400: "The request is malformed, out of bounds, or longer than the model's context",
    401: "No API key where one is needed, or one that is not known; see WWW-Authenticate",
    404: "No such model or path",
    405: "The path does not answer this method",
    413: "The body is larger than the limit",
    429: "Too many requests wait or are open; see Retry-After",
    500: "The workers failed on this request",
    501: "The request asks for something that is not supported",
    503: "No scheduler, model or worker is there, or the gateway is shutting down; see Retry-After",
    504: "The deadline passed",
    529: "Too many requests wait or are open; see Retry-After",
}


def error_responses(*statuses: int, shape: str = "Error") -> dict[int | str, dict[str, Any]]:
    """The documentation of error answers; `shape` names their schema."""
    schema = {"$ref": REFERENCE.format(name=shape)}
    return {
        status: {"description": _MEANINGS[status], "content": {"application/json": {"schema": schema}}}
        for status in statuses
    }


GENERATION_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; server-sent events ending in [DONE] when `stream` is true",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    **error_responses(400, 404, 413, 429, 500, 501, 503, 504),
}

WHOLE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer", "content": {"application/json": {}}},
    **error_responses(400, 404, 413, 429, 500, 501, 503, 504),
}

RESPONSES_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The response; server-sent events, the last of which has it, when `stream` is true",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    **error_responses(400, 404, 413, 429, 500, 501, 503, 504),
}

MESSAGES_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The message; server-sent events when `stream` is true",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    **error_responses(400, 404, 413, 429, 500, 501, 503, 504, 529, shape="MessagesError"),
}

COUNT_RESPONSES = error_responses(400, 404, 413, 429, 501, 503, 529, shape="MessagesError")


_QUESTION = {"role": "user", "content": "What is the capital of France?"}

EXAMPLES: dict[str, dict[str, Any]] = {
    "ChatRequest": {"messages": [_QUESTION], "max_tokens": 32, "temperature": 0.7},
    "CompletionRequest": {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0},
    "GenerateRequest": {
        "text": "The capital of France is",
        "sampling_params": {"max_new_tokens": 16, "temperature": 0},
    },
    "EmbeddingRequest": {"input": ["The capital of France is Paris."]},
    "MessagesRequest": {"messages": [_QUESTION], "max_tokens": 32},
    "CountRequest": {"messages": [_QUESTION]},
    "ResponsesRequest": {"input": "What is the capital of France?", "max_output_tokens": 32},
    "TokenizeRequest": {"prompt": "The capital of France"},
    "DetokenizeRequest": {"tokens": [72, 105]},
}
"""A body for each kind of request that any served model answers (embeddings: one that makes them)."""


def request_body(request_type: type[msgspec.Struct]) -> dict[str, Any]:
    """The `requestBody` of an endpoint that takes this struct."""
    name = request_type.__name__
    content = {"schema": {"$ref": REFERENCE.format(name=name)}, "example": EXAMPLES[name]}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


TIMEOUT_PARAMETER: dict[str, Any] = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "pattern": r"^([1-9][0-9]{0,8}(\.[0-9]{1,9})?|0\.[0-9]{0,8}[1-9])$"},
    "example": "30",
    "description": "Seconds from the request's arrival to the last byte of its answer, as a decimal number; "
    "after them it ends with 504. The server's own limit goes before.",
}


def _correct_statuses(paths: dict[str, Any]) -> None:
    """Whatever needs a key may be refused; and nothing answers with the 422 that FastAPI writes down."""
    for path, methods in paths.items():
        refusals = error_responses(401, shape="MessagesError" if speaks_anthropic(path) else "Error")
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if path not in OPEN_PATHS:
                operation["responses"] |= {str(status): text for status, text in refusals.items()}


def install(app: FastAPI, types: Sequence[type[msgspec.Struct]]) -> None:
    """Add the schemas of request bodies to the document that FastAPI makes of `app`."""
    original = app.openapi

    def document() -> dict[str, Any]:
        made = original()
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        if "Error" not in schemas:
            schemas |= msgspec.json.schema_components(types, ref_template=REFERENCE)[1]
            schemas["Error"] = ERROR_SCHEMA
            schemas["MessagesError"] = MESSAGES_ERROR_SCHEMA
            _correct_statuses(made["paths"])
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
        return made

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way to extend it
