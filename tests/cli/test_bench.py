"""`sfllm bench` against a real HTTP server whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openai_server import OpenAIServer

from sfllm_cli.bench_load import parse_span, shapes
from sfllm_cli.main import main
from sfllm_cli.settings import BenchSettings


def bench(server: OpenAIServer, tmp_path: Path, *flags: str) -> tuple[int, dict[str, object]]:
    """Exit code and results of a run without warm-up."""
    file = tmp_path / "results.json"
    code = main(["bench", "--url", server.url, "--warmup", "0", "--json", str(file), *flags])
    return code, json.loads(file.read_text())


def test_requests_and_tokens_are_counted_exactly(server: OpenAIServer, tmp_path: Path) -> None:
    flags = ("--requests", "12", "--concurrency", "4", "--prompt-tokens", "16", "--output-tokens", "5")
    code, document = bench(server, tmp_path, *flags)
    results = document["results"]
    assert isinstance(results, dict)
    assert code == 0
    assert (results["completed"], results["failed"]) == (12, 0)
    assert (results["prompt_tokens"], results["output_tokens"]) == (12 * 16, 12 * 5)
    assert document["prompts"] == "token ids"
    assert all(len(request["prompt"]) == 16 for request in server.requests[1:])
    latencies = [results[name]["p50"] for name in ("ttft", "tpot", "end_to_end")]
    assert all(0 < latency < 10 for latency in latencies)


def test_no_more_requests_are_open_than_asked_for(server: OpenAIServer, tmp_path: Path) -> None:
    bench(server, tmp_path, "--requests", "20", "--concurrency", "3", "--output-tokens", "20")
    assert 1 <= server.most_open <= 3


def test_a_server_that_takes_only_text_gets_words(server: OpenAIServer, tmp_path: Path) -> None:
    server.text_only = True
    code, document = bench(server, tmp_path, "--requests", "3", "--prompt-tokens", "9")
    assert code == 0
    assert document["prompts"] == "words"
    assert all(len(request["prompt"].split()) == 9 for request in server.requests[2:])


def test_chat_requests_are_measured_too(server: OpenAIServer, tmp_path: Path) -> None:
    code, document = bench(server, tmp_path, "--requests", "4", "--endpoint", "chat", "--prompt-tokens", "6")
    results = document["results"]
    assert isinstance(results, dict)
    assert (code, results["prompt_tokens"], results["output_tokens"]) == (0, 24, 12)


def test_failed_requests_are_reported_and_fail_the_command(
    server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail_every = 3
    code, document = bench(server, tmp_path, "--requests", "8", "--concurrency", "1")
    results = document["results"]
    assert isinstance(results, dict)
    assert (code, results["completed"], results["failed"]) == (1, 5, 3)
    assert "3 failed: HTTP 429: the queue is full" in capsys.readouterr().out


def test_a_stream_without_its_end_is_an_error(
    server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cut_streams = True
    assert main(["bench", "--url", server.url]) == 1
    assert "the stream ended without [DONE]" in capsys.readouterr().err


def test_json_on_standard_output_is_alone_there(
    server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--url", server.url, "--requests", "2", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["results"]["completed"] == 2
    assert "time to first token" in err


def test_the_key_is_sent_and_never_written_down(server: OpenAIServer, tmp_path: Path) -> None:
    _, document = bench(server, tmp_path, "--requests", "1", "--api-key", "secret-1")
    assert server.headers[0]["Authorization"] == "Bearer secret-1"
    assert "secret-1" not in json.dumps(document)


def test_a_server_that_is_not_there_is_a_readable_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", "http://127.0.0.1:9"]) == 1
    assert "Start one with `sfllm serve`" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_load() -> None:
    settings = BenchSettings(prompt_tokens="16:512", output_tokens="1:9", seed=7)
    assert list(shapes(settings, 50)) == list(shapes(settings, 50))
    assert {
        16 <= shape.prompt_tokens <= 512 and 1 <= shape.output_tokens <= 9 for shape in shapes(settings, 50)
    } == {True}


@pytest.mark.parametrize("text", ["0", "9:3", "0:4"])
def test_a_span_without_tokens_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number of tokens"):
        parse_span(text)
