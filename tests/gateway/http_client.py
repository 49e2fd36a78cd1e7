"""Small helpers for reading answers and streams in tests."""

from __future__ import annotations

import json
from typing import Any

import requests
from gateway_process import GatewayProcess


def post(gateway: GatewayProcess, path: str, body: Any = None, **keywords: Any) -> requests.Response:
    if "data" not in keywords:
        keywords["json"] = body
    return requests.post(gateway.url + path, timeout=20, **keywords)


def complete(gateway: GatewayProcess, **fields: Any) -> Any:
    """A completion that works, decoded."""
    answer = post(gateway, "/v1/completions", fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def error(answer: requests.Response, status: int) -> dict[str, Any]:
    """The error of an answer of this status, its shape checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = body["error"]
    return found


def events(answer: requests.Response) -> list[Any]:
    """The events of a stream, without the end mark that must be there."""
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.content.decode().split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith(("data: ", ": ")) for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1] if line.startswith("data: ")]


def stream(gateway: GatewayProcess, path: str, **fields: Any) -> list[Any]:
    return events(post(gateway, path, {**fields, "stream": True}))


def text_of(chunks: list[Any], index: int = 0) -> str:
    """What a client puts together from a stream's chunks for one choice."""
    text = ""
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] == index:
                text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
    return text


def finish_reasons(chunks: list[Any], index: int = 0) -> list[str]:
    return [
        choice["finish_reason"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index and choice["finish_reason"] is not None
    ]
