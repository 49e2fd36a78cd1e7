"""Bodies as an attacker or a broken client sends them, and what every answer to them must be like."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import requests
from gateway_process import GatewayProcess

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "The weather", "parameters": SCHEMA}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
MODEL = "tiny"

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "say:{}"}]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "none",
        "max_tokens": 2,
        "stop": ["x"],
        "logit_bias": {"5": 1.0},
        "chat_template_kwargs": {"a": {"b": []}},
        "metadata": {"a": "b"},
        "stream_options": {"include_usage": True},
        "stream": True,
    },
    "/v1/chat/completions with a schema": {
        "messages": [{"role": "user", "content": "one"}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "city", "strict": True, "schema": SCHEMA},
        },
        "max_tokens": 2,
    },
    "/v1/chat/completions with a call": {
        "messages": [{"role": "user", "content": "one"}],
        "tools": [{"type": "function", "function": {**FUNCTION, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "parallel_tool_calls": False,
        "max_tokens": 2,
    },
    "/v1/messages with a call": {
        "messages": [{"role": "user", "content": "one"}],
        "tools": [{"name": "get_weather", "input_schema": SCHEMA}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "max_tokens": 2,
    },
    "/v1/responses with a call": {
        "input": "one",
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "max_output_tokens": 2,
    },
    "/v1/completions with a choice": {
        "prompt": "one",
        "structured_outputs": {"choice": ["one", "two"]},
        "max_tokens": 2,
    },
    "/v1/completions with an expression": {"prompt": "one", "guided_regex": "[a-z]{3}", "max_tokens": 2},
    "/v1/completions": {
        "model": MODEL,
        "prompt": ["one", "two"],
        "max_tokens": 2,
        "stop_token_ids": [5],
        "bad_words": ["x"],
        "logprobs": 1,
    },
    "/generate": {
        "text": "one",
        "sampling_params": {"max_new_tokens": 2, "temperature": 0.5, "stop": ["x"], "logit_bias": {"5": 1}},
    },
    "/tokenize": {"model": MODEL, "messages": [{"role": "user", "content": "one"}]},
    "/detokenize": {"model": MODEL, "tokens": [1, 2]},
    "/v1/responses": {
        "model": MODEL,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
            {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "sunny"},
        ],
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": "none",
        "text": {"format": {"type": "text"}},
        "max_output_tokens": 2,
        "metadata": {"a": "b"},
    },
    "/v1/messages": {
        "model": MODEL,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "one"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "t", "name": "get_weather", "input": {"city": "x"}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t", "content": "sunny"}],
            },
        ],
        "tools": [{"name": "get_weather", "input_schema": SCHEMA}],
        "tool_choice": {"type": "none"},
        "stop_sequences": ["x"],
        "max_tokens": 2,
    },
    "/v1/messages/count_tokens": {
        "model": MODEL,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "one"}]}],
    },
    "/v1/embeddings": {"model": MODEL, "input": ["one", "two"]},
}
"""For each endpoint bodies that are right, with something at every depth. A name begins with the path."""


def path_of(name: str) -> str:
    """The endpoint of one of `BODIES`."""
    return name.partition(" ")[0]


DEEP = 900
"""As deep as decoders still go: what comes after them meets it."""

VALUES: dict[str, bytes] = {
    "null": b"null",
    "empty object": b"{}",
    "empty list": b"[]",
    "empty text": b'""',
    "NUL": b'"a\\u0000b"',
    "unescaped NUL": b'"a\x00b"',
    "high surrogate": b'"a\\ud800b"',
    "low surrogate": b'"\\udfff"',
    "surrogates the wrong way round": b'"\\udc00\\ud800"',
    "a surrogate in UTF-8": b'"\xed\xa0\x80"',
    "Latin-1": b'"caf\xe9"',
    "overlong UTF-8": b'"\xc0\x80"',
    "not a number": b"NaN",
    "infinity": b"Infinity",
    "minus infinity": b"-Infinity",
    "1e400": b"1e400",
    "-1e400": b"-1e400",
    "1e-400": b"1e-400",
    "-0": b"-0",
    "2**63": b"9223372036854775808",
    "2**64": b"18446744073709551616",
    "10**400": b"1" + b"0" * 400,
    "-10**400": b"-1" + b"0" * 400,
    "10**5000": b"1" + b"0" * 5000,
    "many decimals": b"0." + b"1" * 5000,
    "leading zero": b"01",
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"type":' * DEEP + b"1" + b"}" * DEEP,
    "too deep lists": b"[" * 15_000 + b"]" * 15_000,
    "unclosed": b"[" * 200,
    "duplicate keys": b'{"type":"text","type":"text","type":1}',
    "direction marks": '"\u202e\u2066\ufeff"'.encode(),
    "line ends": b'"a\\r\\nSet-Cookie: b=c\\r\\n\\r\\n"',
    "deep JSON in a text": b'"' + b"[" * 15_000 + b'"',
    "a surrogate in JSON in a text": b'"{\\"a\\": \\"\\\\ud800\\"}"',
    "a large number in JSON in a text": b'"{\\"a\\": 1e400, \\"b\\": 1' + b"0" * 5000 + b'}"',
    "long text": b'"' + b"\\u0000" * 5000 + b'"',
}
"""JSON, and what is none, to put where a value belongs."""

MARK = "@hostile@"


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where in a body there is a value."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def with_value(body: dict[str, Any], place: tuple[str | int, ...], raw: bytes) -> bytes:
    """The body with these bytes as the value at a place, which need not have had one."""
    changed: Any = copy.deepcopy(body)
    at = changed
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = MARK
    return json.dumps(changed).encode().replace(json.dumps(MARK).encode(), raw)


STATUSES = {200, 400, 404, 413, 501}
"""Of answers to requests that reach a server which is well."""

MOST_BYTES = 100_000
"""Of an answer here: what a client sent is not sent back to it in full."""


def fault(path: str, answer: requests.Response) -> str | None:
    """What is wrong with an answer, None if nothing is."""
    kind = answer.headers["content-type"]
    if answer.status_code not in STATUSES:
        return f"status {answer.status_code}: {answer.text[:200]}"
    if len(answer.content) > MOST_BYTES:
        return f"an answer of {len(answer.content)} bytes"
    if answer.status_code == 200 and kind.startswith("text/event-stream"):
        return None
    try:
        body = json.loads(answer.content)
    except ValueError as error:
        return f"no JSON: {error}: {answer.content[:200]!r}"
    wanted = {"message", "type"} if path.startswith("/v1/messages") else {"message", "type", "param", "code"}
    shaped = answer.status_code == 200 or set(body.get("error", ())) == wanted
    return None if shaped and kind == "application/json" else f"another form: {kind}, {answer.text[:200]}"


class Attack:
    """Sends bodies over one connection and collects what is wrong with the answers."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self._gateway = gateway
        self._pid = gateway.process.pid
        self._session = requests.Session()
        self.faults: list[str] = []

    def send(self, path: str, body: bytes, what: str, **headers: str) -> requests.Response:
        answer = self._session.post(
            self._gateway.url + path,
            data=body,
            headers={"Content-Type": "application/json", **headers},
            timeout=20,
        )
        found = fault(path, answer)
        if found:
            self.faults.append(f"{path}, {what}: {found}")
        return answer

    def check(self) -> None:
        """The process is alive, answers, and no answer was wrong."""
        assert self._gateway.process.poll() is None, self._gateway.log()[-4000:]
        assert self._session.get(f"{self._gateway.url}/health", timeout=5).status_code == 200
        self._session.close()
        shown = "\n".join(self.faults[:20])
        assert not self.faults, f"{len(self.faults)} wrong answers:\n{shown}"
