"""Every example of the documentation of the API is answered as it says, and every field has one."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import requests
from running_stack import RunningStack

from sfllm_gateway.anthropic.fields import CountRequest, MessagesRequest
from sfllm_gateway.native import GenerateRequest, SamplingParams
from sfllm_gateway.openai.chat import ChatRequest
from sfllm_gateway.openai.completions import CompletionRequest
from sfllm_gateway.openai.embeddings import EmbeddingRequest
from sfllm_gateway.responses_api.fields import ResponsesRequest
from sfllm_gateway.text_api import DetokenizeRequest, TokenizeRequest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("api-examples.md", "api-reference.md", "structured-output.md", "tool-calling.md")
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:^# (\d{3})\n)?^(curl (?:'[^']*'|[^'\n]|\\\n)*)", re.MULTILINE)
ADDRESS = "http://localhost:8081"
UNSHOWN = {"/openapi.json", "/docs", "/docs/oauth2-redirect"}
"""What is no part of the API."""


class Example(NamedTuple):
    """A request that a page shows, and the status that it says."""

    method: str
    path: str
    body: Any
    status: int


def examples(page: str) -> list[Example]:
    """The curl commands of a page."""
    blocks = re.findall(
        r"^```bash\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    found = []
    for block in blocks:
        for comment, command in re.findall(
            r"(?:^# (\d{3})\n)?^(curl (?:'[^']*'|[^'\n]|\\\n)*)", block, re.MULTILINE
        ):
            found.append(_example(shlex.split(command), int(comment or 200)))
    return [example for example in found if example is not None]


def _example(words: list[str], status: int) -> Example | None:
    url = next((word for word in words if word.startswith(ADDRESS)), None)
    if url is None:
        return None
    body = json.loads(words[words.index("-d") + 1]) if "-d" in words else None
    method = words[words.index("-X") + 1] if "-X" in words else ("GET" if body is None else "POST")
    return Example(method, url.removeprefix(ADDRESS), body, status)


ALL = [(page, number, example) for page in PAGES for number, example in enumerate(examples(page))]


@pytest.mark.parametrize(
    "example", [pytest.param(example, id=f"{page} {number}") for page, number, example in ALL]
)
def test_an_example_is_answered_as_it_says(stack: RunningStack, example: Example) -> None:
    answer = requests.request(example.method, stack.url + example.path, json=example.body, timeout=120)
    assert answer.status_code == example.status, answer.text[:1000]
    assert "X-Sfllm-Ignored-Fields" not in answer.headers
    if isinstance(example.body, dict) and example.body.get("stream"):
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert '"error"' not in answer.text.replace('"error":null', "")


@pytest.mark.parametrize(
    ("path", "request_type"),
    [
        ("/v1/chat/completions", ChatRequest),
        ("/v1/completions", CompletionRequest),
        ("/v1/responses", ResponsesRequest),
        ("/v1/messages", MessagesRequest),
        ("/v1/messages/count_tokens", CountRequest),
        ("/v1/embeddings", EmbeddingRequest),
        ("/generate", GenerateRequest),
        ("/tokenize", TokenizeRequest),
        ("/detokenize", DetokenizeRequest),
    ],
)
def test_every_field_has_an_example(path: str, request_type: type[msgspec.Struct]) -> None:
    bodies = [example.body for example in examples("api-examples.md") if example.path == path]
    shown = {name for body in bodies for name in body}
    assert shown == set(request_type.__struct_fields__)


def test_every_sampling_parameter_of_the_native_form_has_an_example() -> None:
    bodies = [example.body for example in examples("api-examples.md") if example.path == "/generate"]
    shown = {name for body in bodies for name in body["sampling_params"]}
    assert shown == set(SamplingParams.__struct_fields__)


def test_every_endpoint_has_an_example(stack: RunningStack) -> None:
    paths = requests.get(f"{stack.url}/openapi.json", timeout=10).json()["paths"]
    served = {
        (method.upper(), path.replace(":path", ""))
        for path, methods in paths.items()
        for method in methods
        if path not in UNSHOWN
    }
    shown = [(example.method, example.path.partition("?")[0]) for _, _, example in ALL]
    patterns = {(method, path): re.sub(r"\{[^}]*\}", "[^/]+", path) for method, path in served}
    unshown = {
        key
        for key, pattern in patterns.items()
        if not any(method == key[0] and re.fullmatch(pattern, path) for method, path in shown)
    }
    assert not unshown
