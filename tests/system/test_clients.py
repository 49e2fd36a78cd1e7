"""Clients from PyPI and npm, in their current releases and environments of their own, against a whole sfllm.

Each script of tests/clients says in JSON what it got. The model is too small to say much that is true:
what counts is that clients understand every answer, and that what has a form keeps it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from client_scripts import Clients

from sfllm_worker.load.gguf import GgufFile
from sfllm_worker.load.gguf_tokenizer import build_tokenizer

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

CAPITAL = "The capital of France is Paris."
COUNTING = " 6, 7, 8"


def check_call(call: list[Any], name: str, **types: type) -> None:
    """The function's name, and arguments of these types and no others."""
    assert call[0] == name
    assert {key: type(value) for key, value in call[1].items()} == types


def check_fields(found: dict[str, Any], **types: type) -> None:
    assert {key: type(value) for key, value in found.items()} == types


def test_openai_asks_streams_and_raises_its_own_exceptions(clients: Clients) -> None:
    found = clients.run("clients", "openai_sync.py")
    assert found["models"] == [clients.model]
    assert found["card"] == clients.model
    assert (found["chat"], found["streamed"], found["gathered"]) == (CAPITAL, CAPITAL, CAPITAL)
    usage, streamed = found["usage"], found["streamed usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert streamed["completion_tokens"] == usage["completion_tokens"]
    assert found["completion"].startswith(COUNTING)
    assert found["logprobs"] == 12
    assert found["errors"] == {
        "unknown model": ["NotFoundError", "model_not_found", "model"],
        "temperature": ["BadRequestError", "invalid_request", "temperature"],
        "too long": ["BadRequestError", "context_length_exceeded", "messages"],
        "wrong key": ["AuthenticationError", "invalid_api_key", None],
    }


def test_openai_async_streams_eight_answers_at_once_and_leaves_one(clients: Clients) -> None:
    assert clients.run("clients", "openai_async.py") == {"counts": [*range(1, 9)], "left after": 3}


def test_openai_parses_pydantic_models_whole_and_streamed(clients: Clients) -> None:
    found = clients.run("clients", "openai_parse.py")
    check_fields(found["parsed"], name=str, legs=int, colour=str, tame=bool)
    assert found["streamed"] == found["parsed"]
    assert found["cut"] == "LengthFinishReasonError"
    check_fields(json.loads(found["by hand"]), n=int)
    if found["loose ended"] == "stop":
        assert isinstance(json.loads(found["loose"]), dict)
    assert found["refused"].startswith("response_format")


def test_openai_calls_functions_that_are_required_or_named(clients: Clients) -> None:
    found = clients.run("clients", "openai_tools.py")
    assert {call[0] for call in found["required"]} <= {"get_weather", "get_time"}
    assert found["required"]
    check_call(found["named"], "get_weather", city=str, unit=str)
    assert found["named"][1]["unit"] in {"celsius", "fahrenheit"}
    assert found["streamed"] == found["named"]
    # As OpenAI has it: a call that the client named is no reason to stop for.
    assert (found["required ended"], found["named ended"]) == ("tool_calls", "stop")
    assert found["streamed ended"] == ["stop"]
    check_fields(found["parsed"], city=str, unit=str)
    assert found["after"]
    assert found["after calls"] is None


def test_openai_responses_come_whole_parsed_and_as_events_in_order(clients: Clients) -> None:
    found = clients.run("clients", "openai_responses.py")
    assert (found["asked"], found["streamed"], found["final"]) == (CAPITAL, CAPITAL, CAPITAL)
    assert found["status"] == "completed"
    assert found["further"]
    deltas = [kind for kind in found["kinds"] if kind == "response.output_text.delta"]
    assert [kind for kind in found["kinds"] if kind not in deltas] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    check_fields(found["parsed"], name=str, inhabitants=int)
    check_call(found["call"], "get_weather", city=str)
    assert found["after"]
    [unknown, hot, stored] = found["errors"]
    assert unknown == [404, "model"]
    assert hot == [400, "temperature"]
    assert stored[0] in {400, 501}
    assert stored[1] == "previous_response_id"


def test_node_asks_streams_parses_and_runs_functions(clients: Clients) -> None:
    found = clients.run_node("openai.mjs")
    assert found["models"] == [clients.model]
    assert (found["asked"], found["streamed"], found["gathered"]) == (CAPITAL, CAPITAL, CAPITAL)
    assert found["responded"] == CAPITAL
    assert found["usage"] > 0
    assert found["completed"] == COUNTING
    check_fields(found["parsed"], name=str, inhabitants=int)
    [arguments] = found["called"]
    check_fields(arguments, name=str, inhabitants=int)
    assert found["errors"] == [["NotFoundError", 404, "model"], ["BadRequestError", 400, "temperature"]]


def test_langchain_chains_batches_and_binds_tools(clients: Clients) -> None:
    found = clients.run("clients", "with_langchain.py")
    assert "Paris" in found["asked"]
    assert found["usage"] > 0
    assert found["streamed"] == CAPITAL
    assert found["batch"] == [CAPITAL, CAPITAL]
    assert found["completed"] == COUNTING
    check_fields(found["structured"], name=str, inhabitants=int)
    check_call(found["call"], "get_weather", city=str)
    assert found["result"] == f"sunny in {found['call'][1]['city']}"


def test_litellm_asks_streams_and_translates_errors(clients: Clients) -> None:
    found = clients.run("older_openai", "with_litellm.py")
    assert (found["asked"], found["streamed"]) == (CAPITAL, CAPITAL)
    assert found["usage"] > 0
    assert found["at once"] == [CAPITAL] * 4
    assert found["errors"] == ["NotFoundError", "BadRequestError", "AuthenticationError"]
    check_fields(found["structured"], name=str, inhabitants=int)
    name, arguments = found["call"]
    assert name == "get_weather"
    assert isinstance(arguments["city"], str), "litellm opens schemas: others may come, too"


def test_instructor_gets_models_by_tools_and_by_schema(clients: Clients) -> None:
    found = clients.run("older_openai", "with_instructor.py")
    assert set(found) == {"TOOLS", "TOOLS streamed", "JSON_SCHEMA", "JSON_SCHEMA streamed"}
    for person in found.values():
        check_fields(person, name=str, age=int)


def test_anthropic_counts_asks_streams_and_uses_tools(clients: Clients) -> None:
    found = clients.run("clients", "with_anthropic.py")
    assert found["counted"] == found["input"] > 0
    assert found["asked"]
    assert (found["streamed"], found["gathered"]) == (found["asked"], found["asked"])
    assert found["ended"] in {"end_turn", "max_tokens"}
    check_call(found["call"], "get_weather", city=str)
    check_call(found["streamed call"], "get_weather", city=str)
    assert (found["call ended"], found["streamed call ended"]) == ("tool_use", "tool_use")
    assert found["after"]
    assert found["errors"] == [
        ["NotFoundError", "error", "not_found_error"],
        ["BadRequestError", "error", "invalid_request_error"],
        ["AuthenticationError", "error", "authentication_error"],
    ]


def test_pydantic_ai_goes_through_a_loop_of_tools_to_a_typed_answer(clients: Clients) -> None:
    found = clients.run("clients", "with_pydantic_ai.py")
    [first, second] = found["called"]
    assert (first[0], type(first[1])) == ("find_station", str)
    assert (second[0], type(second[1])) == ("get_weather", int)
    assert found["requests"] == 3
    assert found["tokens"] > 0
    check_fields(found["loop"], city=str, degrees=int)
    check_fields(found["native"], city=str, degrees=int)
    assert "".join(found["streamed"]) == CAPITAL
    assert len(found["streamed"]) > 1


LLM_MODELS = """\
- model_id: sfllm
  model_name: {model}
  api_base: {url}/v1
  api_key_name: openai
  supports_schema: true
"""


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_the_llm_command_asks_goes_on_and_fills_in_a_schema(clients: Clients) -> None:
    models = LLM_MODELS.format(model=clients.model, url=clients.url)
    (clients.home / "extra-openai-models.yaml").write_text(models)
    options = ("-m", "sfllm", "-o", "temperature", "0", "-o", "max_tokens")

    def ask(*arguments: str, tokens: int = 24) -> str:
        return clients.command("clients", "llm", *options, str(tokens), *arguments)

    assert ask("What is the capital of France?") == f"{CAPITAL}\n"
    assert ask("--no-stream", "What is the capital of France?") == f"{CAPITAL}\n"
    assert ask("--continue", "And of Italy?").strip()
    person = ask("--schema", json.dumps(PERSON), "Ada is 36.", tokens=200)
    check_fields(json.loads(person), name=str, age=int)


def test_aiperf_measures_every_request_and_every_token(clients: Clients, smollm2_gguf: Path) -> None:
    tokenizer = build_tokenizer(GgufFile(smollm2_gguf).metadata)
    directory = clients.home / "tokenizer"
    directory.mkdir()
    (directory / "tokenizer.json").write_text(tokenizer.tokenizer.to_str())
    names = {**tokenizer.config, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    clients.command(
        "aiperf",
        "aiperf",
        *("profile", "--model", clients.model, "--url", clients.url, "--api-key", clients.key),
        *("--endpoint-type", "chat", "--streaming", "--tokenizer", str(directory)),
        *("--synthetic-input-tokens-mean", "40", "--output-tokens-mean", "16", "--random-seed", "1"),
        *("--extra-inputs", "ignore_eos:true", "--concurrency", "3", "--request-count", "12"),
        *("--artifact-dir", str(clients.home / "aiperf"), "--ui", "none"),
        seconds=240,
    )
    report = json.loads((clients.home / "aiperf" / "profile_export_aiperf.json").read_text())
    assert report["error_summary"] == []
    assert report["is_complete"]
    assert report["completed_request_count"]["avg"] == 12
    assert report["total_usage_completion_tokens"]["avg"] == 12 * 16
    assert report["time_to_first_token"]["avg"] > 0
