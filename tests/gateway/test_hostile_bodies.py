"""Every POST endpoint of a real gateway process under hostile bodies: clean errors, and no crash."""

from __future__ import annotations

import codecs
import gzip
import json
import socket
from typing import Any

import pytest
import requests
from gateway_process import GatewayProcess
from hostile import BODIES, VALUES, Attack, path_of, places, with_value
from http_client import read_all
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAMES = sorted(BODIES)
PATHS = sorted({path_of(name) for name in NAMES})


@pytest.fixture(scope="module")
def document(shared_gateway: GatewayProcess) -> Any:
    return requests.get(f"{shared_gateway.url}/openapi.json", timeout=20).json()


def fields(document: Any, path: str) -> list[str]:
    """What the document says that a body of this endpoint may have."""
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return sorted(document["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"])


def test_every_endpoint_that_takes_a_body_is_tried_here(document: Any) -> None:
    posts = {path: methods.get("post", {}) for path, methods in document["paths"].items()}
    assert {path for path, operation in posts.items() if "requestBody" in operation} == set(PATHS)


@pytest.mark.parametrize("name", NAMES)
def test_the_bodies_that_are_changed_below_are_right_themselves(gateway: GatewayProcess, name: str) -> None:
    answer = requests.post(gateway.url + path_of(name), json=BODIES[name], timeout=20)
    # The model of these tests makes no embeddings.
    assert answer.status_code == (501 if name == "/v1/embeddings" else 200), answer.text


NO_REQUESTS = {
    "nothing": b"",
    "blank": b" \n\t",
    "half": b"{",
    "a list": b"[]",
    "null": b"null",
    "a number": b"17",
    "a text": b'"text"',
    "NUL": b"\x00" * 100,
    "NUL behind it": b"{}\x00",
    "two of them": b"{}{}",
    "a UTF-8 mark": codecs.BOM_UTF8 + b"{}",
    "UTF-16": json.dumps({"model": "tiny"}).encode("utf-16"),
    "UTF-32": json.dumps({"model": "tiny"}).encode("utf-32"),
    "compressed": gzip.compress(b"{}"),
    "deep lists": b"[" * 30_000,
    "deep objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "a comment": b"/* */{}",
    "a form": b"model=tiny&prompt=x",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_is_no_request_is_400(gateway: GatewayProcess, path: str) -> None:
    attack = Attack(gateway)
    for name, body in NO_REQUESTS.items():
        answer = attack.send(path, body, name)
        assert answer.status_code == 400, (name, answer.text)
    attack.check()


@pytest.mark.parametrize("path", PATHS)
def test_a_right_body_in_another_encoding_is_400_and_never_misread(
    gateway: GatewayProcess, path: str
) -> None:
    attack = Attack(gateway)
    text = json.dumps(BODIES[path])
    for name, body, headers in (
        ("UTF-16", text.encode("utf-16"), {"Content-Type": "application/json; charset=utf-16"}),
        ("a UTF-8 mark", codecs.BOM_UTF8 + text.encode(), {}),
        ("compressed", gzip.compress(text.encode()), {"Content-Encoding": "gzip"}),
        ("Latin-1", b'{"model": "caf\xe9"}', {"Content-Type": "application/json; charset=latin-1"}),
    ):
        assert attack.send(path, body, name, **headers).status_code == 400, name
    attack.check()


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_value_anywhere_gets_a_clean_answer(
    gateway: GatewayProcess, document: Any, name: str
) -> None:
    attack = Attack(gateway)
    body, path = BODIES[name], path_of(name)
    where = {*places(body)}
    if name == path:
        where |= {*((field,) for field in fields(document, path)), ("unknown",), ("x\r\nA: b",)}
    for place in sorted(where, key=str):
        for what, raw in VALUES.items():
            attack.send(path, with_value(body, place, raw), f"{what} at {place} of {name}")
    attack.check()


@pytest.mark.parametrize("path", PATHS)
def test_duplicate_and_hostile_keys_get_a_clean_answer(gateway: GatewayProcess, path: str) -> None:
    attack = Attack(gateway)
    text = json.dumps(BODIES[path]).encode()
    for name in BODIES[path]:
        for value in (b"null", b"1", b'"x"', json.dumps(BODIES[path][name]).encode()):
            key = json.dumps(name).encode()
            attack.send(path, b"{%s:%s,%s" % (key, value, text[1:]), f"{name} first as {value!r}")
            attack.send(path, b"%s,%s:%s}" % (text[:-1], key, value), f"{name} again as {value!r}")
    for key in (b"", b"\\u0000", b"\\ud800", b"\xff", b"x" * 20_000, b"__proto__", b"a\\r\\nSet-Cookie: b=c"):
        answer = attack.send(path, b'%s,"%s":1}' % (text[:-1], key), f"key {key[:30]!r}")
        assert "Set-Cookie" not in answer.headers
    many = b"".join(b',"field%d":1' % number for number in range(4000))
    attack.send(path, text[:-1] + many + b"}", "thousands of unknown fields")
    attack.check()


@pytest.mark.parametrize("name", NAMES)
def test_a_body_cut_off_anywhere_is_400(gateway: GatewayProcess, name: str) -> None:
    attack = Attack(gateway)
    text = json.dumps(BODIES[name]).encode()
    for length in range(0, len(text), 7):
        answer = attack.send(path_of(name), text[:length], f"{length} bytes")
        assert answer.status_code == 400
    attack.check()


@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_sends_less_than_it_said_harms_nobody(gateway: GatewayProcess, path: str) -> None:
    text = json.dumps(BODIES[path]).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for said, sent in (
        (f"Content-Length: {len(text) + 100}", text),
        ("Transfer-Encoding: chunked", b"%x\r\n%s" % (len(text) + 100, text)),
        ("Transfer-Encoding: chunked", b"zz\r\n"),
        (f"Content-Length: {len(text)}\r\nContent-Length: 1", text),
        ("Content-Length: -1", text),
        ("Content-Length: 99999999999999999999999", text),
    ):
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as client:
            client.sendall(f"{head}{said}\r\n\r\n".encode() + sent)
            client.shutdown(socket.SHUT_WR)
            answer = read_all(client)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413")), (said, answer)
    Attack(gateway).check()


def mutated(draw: st.DrawFn, body: bytes) -> bytes:
    """A body with a few pieces of it removed, doubled or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(body)))
        end = min(len(body), start + draw(st.integers(0, 12)))
        piece = draw(
            st.one_of(st.binary(max_size=6), st.sampled_from([*VALUES.values(), body[start:end] * 2]))
        )
        body = body[:start] + piece + body[end:]
    return body


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(NAMES))
    return path_of(name), mutated(draw, json.dumps(BODIES[name]).encode())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=mutations())
def test_a_body_damaged_at_random_gets_a_clean_answer(
    gateway: GatewayProcess, case: tuple[str, bytes]
) -> None:
    attack = Attack(gateway)
    path, body = case
    attack.send(path, body, repr(body[:500]))
    attack.check()
