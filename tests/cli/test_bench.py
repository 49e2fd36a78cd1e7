"""`sfllm bench` against a real HTTP server whose answers are known."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai_server import OpenAIServer, running

from sfllm_cli.bench.command import together
from sfllm_cli.bench.sending import Sender, open_loop
from sfllm_cli.main import main


def bench(server: OpenAIServer, tmp_path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit code and results of a run without warm-up."""
    file = tmp_path / "results.json"
    code = main(["bench", "--url", server.url, "--warmup", "0", "--json", str(file), *flags])
    return code, json.loads(file.read_text())


def result(document: dict[str, Any]) -> dict[str, Any]:
    """The only result."""
    (only,) = document["results"]
    assert isinstance(only, dict)
    return only


def test_requests_and_tokens_are_counted_exactly(server: OpenAIServer, tmp_path: Path) -> None:
    flags = ("--requests", "12", "--concurrency", "4", "--prompt-tokens", "16", "--output-tokens", "5")
    code, document = bench(server, tmp_path, *flags)
    results = result(document)
    assert code == 0
    assert (results["completed"], results["failed"]) == (12, 0)
    assert (results["prompt_tokens"], results["output_tokens"]) == (12 * 16, 12 * 5)
    assert results["tokens_counted_by"] == "usage"
    assert document["servers"]["server"]["prompts"] == "token ids"
    assert all(len(request["prompt"]) == 16 for request in server.requests[1:])
    assert 0 < results["ttft"]["p50"] <= results["end_to_end"]["p99"] < 10
    assert 0 <= results["tpot"]["p50"] <= results["end_to_end"]["p99"]


def test_without_usage_every_chunk_counts_as_a_token_and_that_is_said(
    server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.sends_usage = False
    _, document = bench(server, tmp_path, "--requests", "3", "--output-tokens", "7")
    assert (result(document)["output_tokens"], result(document)["tokens_counted_by"]) == (21, "chunks")
    assert "the server sends no usage" in capsys.readouterr().out


def test_no_more_requests_are_open_than_asked_for(server: OpenAIServer, tmp_path: Path) -> None:
    bench(server, tmp_path, "--requests", "20", "--concurrency", "3", "--output-tokens", "20")
    assert 1 <= server.most_open <= 3


def test_an_open_loop_does_not_wait_for_answers(server: OpenAIServer, tmp_path: Path) -> None:
    server.answers_together = 20  # none is answered before all are open
    code, document = bench(server, tmp_path, "--requests", "20", "--request-rate", "200")
    assert (code, result(document)["completed"]) == (0, 20)
    assert result(document)["request_rate"] == 200
    assert server.most_open == 20


async def test_no_request_of_an_open_loop_is_sent_before_its_time(server: OpenAIServer) -> None:
    times = [0.0, 0.05, 0.05, 0.3]
    body = b'{"prompt": "one two", "max_tokens": 1}'
    async with aiohttp.ClientSession() as session:
        started = time.perf_counter()
        sender = Sender(session, server.url + "/v1/completions")
        samples = await open_loop(sender, [body] * len(times), times, lambda: None)
    sent = sorted(sample.sent_at - started for sample in samples)
    assert [sample.error for sample in samples] == [""] * len(times)
    assert all(moment >= due - 0.002 for moment, due in zip(sent, times, strict=True))


def test_all_requests_can_be_sent_at_once(server: OpenAIServer, tmp_path: Path) -> None:
    server.answers_together = 30
    _, document = bench(server, tmp_path, "--requests", "30", "--request-rate", "inf")
    assert (result(document)["completed"], result(document)["request_rate"]) == (30, "inf")


def test_a_trace_is_replayed_with_its_lengths(server: OpenAIServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time,prompt_tokens,output_tokens\n5.0,30,2\n5.1,9,4\n5.05,20,3\n")
    _, document = bench(server, tmp_path, "--trace", str(trace))
    sent = {(len(request["prompt"]), request["max_tokens"]) for request in server.requests[1:]}
    assert sent == {(30, 2), (20, 3), (9, 4)}
    assert (result(document)["concurrency"], result(document)["request_rate"]) == (None, None)


def test_a_file_that_is_no_trace_is_a_readable_error(
    server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time,prompt_tokens,output_tokens\n1,many,2\n")
    assert main(["bench", "--url", server.url, "--trace", str(trace)]) == 1
    assert "trace.csv: line 2: 'many' is no number of tokens" in capsys.readouterr().err
    assert main(["bench", "--url", server.url, "--trace", str(tmp_path / "none.csv")]) == 1
    assert "cannot read" in capsys.readouterr().err
    assert server.requests == []


def test_the_made_up_trace_needs_no_file(server: OpenAIServer, tmp_path: Path) -> None:
    _, document = bench(server, tmp_path, "--trace", "chat", "--requests", "5", "--request-rate", "inf")
    assert result(document)["completed"] == 5
    assert len({len(request["prompt"]) for request in server.requests[1:]}) > 1


def test_a_shared_prefix_comes_before_prompts_that_differ(server: OpenAIServer, tmp_path: Path) -> None:
    flags = ("--prefix-tokens", "50", "--prefixes", "2", "--prompt-tokens", "10", "--requests", "12")
    bench(server, tmp_path, *flags)
    prompts = [request["prompt"] for request in server.requests[1:]]
    assert {len(prompt) for prompt in prompts} == {60}
    assert len({tuple(prompt[:50]) for prompt in prompts}) == 2
    assert len({tuple(prompt[50:]) for prompt in prompts}) == 12


def test_a_sweep_measures_every_point_in_every_round(server: OpenAIServer, tmp_path: Path) -> None:
    flags = ("--concurrency", "1", "3", "--rounds", "2", "--requests", "4", "--max-disturbance", "1000")
    code, document = bench(server, tmp_path, *flags)
    order = [(leg["round"], leg["concurrency"]) for leg in document["rounds"]]
    assert (code, order) == (0, [(1, 1), (1, 3), (2, 1), (2, 3)])
    assert [each["rounds"] for each in document["results"]] == [2, 2]
    prompts = {tuple(request["prompt"]) for request in server.requests[1:]}
    assert len(prompts) == 16, "a prompt that comes again could be answered from a cache"


def test_servers_are_compared_in_interleaved_rounds_with_the_same_requests(
    server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    flags = ["--rounds", "2", "--requests", "3", "--max-disturbance", "1000", "--json", str(file)]
    with running(OpenAIServer()) as other:
        code = main(["bench", "--url", f"ours={server.url}", "--url", f"theirs={other.url}/v1", *flags])
        assert [request["prompt"] for request in server.requests[-6:]] == [
            request["prompt"] for request in other.requests[-6:]
        ]
    document = json.loads(file.read_text())
    order = [leg["server"] for leg in document["rounds"]]
    assert (code, order) == (0, ["ours", "theirs", "theirs", "ours"])
    out = capsys.readouterr().out
    assert "40 at once: ours is" in out
    assert "x theirs in output tokens/s" in out


def test_every_file_is_written(server: OpenAIServer, tmp_path: Path) -> None:
    files = {form: tmp_path / f"results.{form}" for form in ("csv", "html", "png")}
    flags = [text for form, file in files.items() for text in (f"--{form}", str(file))]
    code, document = bench(server, tmp_path, "--requests", "4", "--concurrency", "1", "2", *flags)
    assert code == 0
    rows = list(csv.DictReader(files["csv"].open()))
    assert [row["concurrency"] for row in rows] == ["1", "2"]
    assert float(rows[0]["ttft_p50_ms"]) == pytest.approx(
        document["results"][0]["ttft"]["p50"] * 1000, abs=1e-3
    )
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    page = files["html"].read_text()
    assert "<svg" in page
    assert server.url in page
    assert not any(word in page for word in ("<script", "<link", "src="))


def test_a_server_that_takes_only_text_gets_words(server: OpenAIServer, tmp_path: Path) -> None:
    server.text_only = True
    code, document = bench(server, tmp_path, "--requests", "3", "--prompt-tokens", "9")
    assert code == 0
    assert document["servers"]["server"]["prompts"] == "words"
    assert all(len(request["prompt"].split()) == 9 for request in server.requests[2:])


def test_chat_requests_are_measured_too(server: OpenAIServer, tmp_path: Path) -> None:
    code, document = bench(server, tmp_path, "--requests", "4", "--endpoint", "chat", "--prompt-tokens", "6")
    results = result(document)
    assert (code, results["prompt_tokens"], results["output_tokens"]) == (0, 24, 12)


def test_failed_requests_are_reported_and_fail_the_command(
    server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail_every = 3
    code, document = bench(server, tmp_path, "--requests", "8", "--concurrency", "1")
    results = result(document)
    assert (code, results["completed"], results["failed"]) == (1, 5, 3)
    assert results["good_share"] == 5 / 8
    assert "3 failed: HTTP 429: the queue is full" in capsys.readouterr().out


def test_a_stream_without_its_end_is_an_error(
    server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cut_streams = True
    assert main(["bench", "--url", server.url]) == 1
    assert "the stream ended without a finish_reason" in capsys.readouterr().err


def test_json_on_standard_output_is_alone_there(
    server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--url", server.url, "--requests", "2", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert result(json.loads(out))["completed"] == 2
    assert "time to first token" in err


def test_the_key_is_sent_and_never_written_down(server: OpenAIServer, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    _, document = bench(server, tmp_path, "--requests", "1", "--api-key", "secret-1", "--html", str(page))
    assert server.headers[0]["Authorization"] == "Bearer secret-1"
    assert "secret-1" not in json.dumps(document) + page.read_text()


def test_more_fields_reach_every_request(server: OpenAIServer, tmp_path: Path) -> None:
    bench(server, tmp_path, "--requests", "2", "--extra-body", '{"top_k": 20}', "--ignore-eos")
    assert all((request["top_k"], request["ignore_eos"]) == (20, True) for request in server.requests)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--extra-body", "[1]"], "expected a JSON object"),
        (["--prompt-tokens", "9:3"], "expected a number of tokens"),
        (["--url", "a=http://x", "--url", "a=http://y"], "names 'a' twice"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_the_load(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_server_that_is_not_there_is_a_readable_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", "http://127.0.0.1:9"]) == 1
    assert "Start one with `sfllm serve`" in capsys.readouterr().err


def test_a_flag_that_is_repeated_keeps_all_values() -> None:
    argv = ["--url", "a=1", "--seed", "3", "--url=b=2"]
    assert together("--url", argv) == ["--seed", "3", "--url", "a=1,b=2"]
    assert together("--url", ["--seed", "3"]) == ["--seed", "3"]
