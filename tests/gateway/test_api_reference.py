"""The API reference names what there is, all of it and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import requests
from gateway_process import GatewayProcess

from sfllm.errors import HTTP_ERRORS
from sfllm_gateway.anthropic.fields import MessagesRequest
from sfllm_gateway.native import GenerateRequest, SamplingParams
from sfllm_gateway.openai.chat import ChatRequest
from sfllm_gateway.openai.completions import CompletionRequest
from sfllm_gateway.openai.embeddings import EmbeddingRequest
from sfllm_gateway.openai.unbuilt import UNBUILT
from sfllm_gateway.responses_api.fields import ResponsesRequest
from sfllm_gateway.text_api import DetokenizeRequest, TokenizeRequest

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs" / "api-reference.md").read_text(encoding="utf-8")
METRICS = {
    "Of a gateway": ROOT / "services/gateway/sfllm_gateway/metrics.py",
    "Of a scheduler": ROOT / "services/scheduler/sfllm_scheduler/observe.py",
    "Of a worker": ROOT / "services/worker/sfllm_worker/metrics.py",
}


def rows(title: str) -> list[list[str]]:
    """The cells of the tables below a heading."""
    section = re.split(r"^#+ ", REFERENCE.partition(f"# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    tables = re.findall(r"^\|.*\n\|[-|]+\n((?:\|.*\n?)+)", section, flags=re.MULTILINE)
    assert tables, title
    lines = [line for table in tables for line in table.splitlines()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(*titles: str) -> list[str]:
    """What the first columns of tables name."""
    return [name for title in titles for row in rows(title) for name in re.findall(r"`([^`]+)`", row[0])]


def test_the_endpoints_are_those_of_the_document(gateway: GatewayProcess) -> None:
    paths = requests.get(f"{gateway.url}/openapi.json", timeout=10).json()["paths"]
    served = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    assert sorted(names("Endpoints")) == sorted(path.replace(":path", "") for path in served)


@pytest.mark.parametrize(
    ("request_type", "titles"),
    [
        (ChatRequest, ("Both", "Chat only")),
        (CompletionRequest, ("Both", "Completions only")),
        (GenerateRequest, ("Fields of /generate",)),
        (SamplingParams, ("Fields of sampling_params",)),
        (TokenizeRequest, ("Fields of /tokenize",)),
        (EmbeddingRequest, ("Fields of /v1/embeddings",)),
        (DetokenizeRequest, ("Fields of /detokenize",)),
        (MessagesRequest, ("Fields of /v1/messages",)),
        (ResponsesRequest, ("Fields of /v1/responses",)),
    ],
)
def test_the_fields_are_those_of_the_request(
    request_type: type[msgspec.Struct], titles: tuple[str, ...]
) -> None:
    assert sorted(names(*titles)) == sorted(request_type.__struct_fields__)


def test_the_fields_that_are_not_built_are_those_of_their_table() -> None:
    assert sorted(names("Known, but not built yet")) == sorted(UNBUILT)


def test_the_errors_are_those_that_exist() -> None:
    documented = {(row[2].strip("`"), int(row[0]), row[1].strip("`")) for row in rows("Errors")}
    assert documented == {(code.value, http.status, http.type) for code, http in HTTP_ERRORS.items()}


@pytest.mark.parametrize("title", METRICS)
def test_the_metrics_are_those_of_the_process(title: str) -> None:
    source = METRICS[title].read_text(encoding="utf-8")
    made = re.findall(r'\b(gauge|counter|histogram|_latency)\(\s*"(\w+)"', source)
    expected = {(name, kind.replace("_latency", "histogram")) for kind, name in made}
    assert {(row[0].strip("`"), row[1]) for row in rows(title)} == expected
