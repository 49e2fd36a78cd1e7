"""Small helpers for reading answers and streams in tests."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
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


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def open_stream(gateway: GatewayProcess, **fields: object) -> tuple[requests.Response, Iterator[bytes]]:
    """A stream after its first event with text."""
    body = {"prompt": "x", "stream": True, "max_tokens": 26, **fields}
    answer = requests.post(gateway.url + "/v1/completions", json=body, stream=True, timeout=20)
    assert answer.status_code == 200
    lines = answer.iter_lines(chunk_size=1)
    return answer, lines


def read_all(client: socket.socket) -> bytes:
    """All that is still to come; a connection that was cut off may end with a reset."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def rest(lines: Iterator[bytes]) -> list[dict[str, object]]:
    found = [line[6:] for line in lines if line.startswith(b"data: ")]
    assert found[-1] == b"[DONE]"
    return [json.loads(line) for line in found[:-1]]


def begin(gateway: GatewayProcess, path: str, body: Any, **headers: str) -> socket.socket:
    """A connection on which a whole request was sent and nothing was read."""
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    client = socket.create_connection(("127.0.0.1", gateway.port), timeout=20)
    client.sendall("\r\n".join([*lines, "", ""]).encode() + data)
    return client
