"""`sfllm batch` as a process, against a server that misbehaves as it is told, and against a real stack."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

COMMAND = (sys.executable, "-m", "sfllm_cli", "batch")
WAIT_SECONDS = 60

Handler = Callable[[web.Request, str, int], Any]


class FaultyServer:
    """Answers a completion whose prompt is its custom_id; `act` may answer it in another way.

    `act(request, prompt, attempt)` gives a response, None for the usual one, or an awaitable of
    either; `attempt` counts from 1.
    """

    def __init__(self, act: Handler | None = None, port: int = 0) -> None:
        self.url = ""
        self.port = port
        self.act = act
        self.prompts: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.open = self.most_open = 0
        self._arrived = threading.Condition()

    async def models(self, request: web.Request) -> web.Response:
        self.keys.add(request.headers.get("Authorization"))
        return web.json_response({"object": "list", "data": [{"id": "tiny"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            with self._arrived:
                self.prompts.append(body["prompt"])
                self.bodies.append(body)
                self._arrived.notify_all()
            response = self.act and self.act(request, body["prompt"], self.prompts.count(body["prompt"]))
            if asyncio.iscoroutine(response):
                response = await response
            return response or self.usual(body)
        finally:
            self.open -= 1

    def usual(self, body: dict[str, Any]) -> web.Response:
        usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        answer = {"object": "text_completion", "choices": [{"text": body["prompt"][::-1]}], "usage": usage}
        # On several lines, as a server may write it.
        text = json.dumps(answer, indent=2)
        headers = {"x-request-id": f"req-{body['prompt']}"}
        return web.Response(text=text, content_type="application/json", headers=headers)

    def wait_for(self, count: int) -> None:
        """Until so many requests have come."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.prompts) >= count, WAIT_SECONDS)


@contextmanager
def running(server: FaultyServer) -> Iterator[FaultyServer]:
    """`server` in a thread of its own, at a port of loopback."""
    application = web.Application()
    application.router.add_get("/v1/models", server.models)
    application.router.add_post("/v1/completions", server.completions)
    started, stop, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", server.port, reuse_address=True).start()
            server.port = runner.addresses[0][1]
            server.url = f"http://127.0.0.1:{server.port}"
            started.set()
            await stop.wait()
        finally:
            await runner.cleanup()
            held = asyncio.all_tasks() - {asyncio.current_task()}
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert started.wait(10)
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


class Files:
    """The files of one batch, with `count` requests whose prompts are their custom_ids."""

    def __init__(self, folder: Path, count: int) -> None:
        self.source, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.errors = folder / "out.errors.jsonl"
        self.custom_ids = [f"request-{index}" for index in range(count)]
        self.source.write_text("".join(request_line(custom_id) for custom_id in self.custom_ids))

    def command(self, url: str, *flags: str) -> list[str]:
        return [*COMMAND, str(self.source), str(self.output), "--url", url, *flags]

    def run(self, url: str, *flags: str) -> subprocess.CompletedProcess[str]:
        command = self.command(url, *flags)
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)

    def answered(self) -> list[str]:
        return [line["custom_id"] for line in lines(self.output)]

    def failed(self) -> dict[str, Any]:
        return {line["custom_id"]: line for line in lines(self.errors)}

    def check_complete(self) -> None:
        """Every request has one answer, and that answer is its own."""
        assert Counter(self.answered()) == Counter(self.custom_ids)
        for line in lines(self.output):
            assert line["response"]["status_code"] == 200
            assert line["response"]["body"]["choices"][0]["text"] == line["custom_id"][::-1]


def request_line(custom_id: str) -> str:
    body = {"prompt": custom_id, "max_tokens": 2}
    return (
        json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
    )


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that must end with a newline."""
    if not path.exists():
        return []
    content = path.read_bytes()
    assert not content or content.endswith(b"\n")
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_every_line_is_answered_in_openai_s_form_and_the_use_is_told(tmp_path: Path) -> None:
    files = Files(tmp_path, 50)
    with running(FaultyServer()) as server:
        finished = files.run(server.url, "--concurrency=4", "--api-key=secret", "--model=other")
    assert finished.returncode == 0, finished.stderr
    files.check_complete()
    assert lines(files.output)[0]["response"]["request_id"].startswith("req-request-")
    assert lines(files.output)[0]["error"] is None
    assert server.keys == {"Bearer secret"}
    assert {body["model"] for body in server.bodies} == {"other"}
    assert server.most_open <= 4
    assert "50 requests: 50 answered (0 of them earlier), 0 failed, 0 left" in finished.stderr
    assert "150 prompt tokens, 250 output tokens" in finished.stderr
    assert "\x1b" not in finished.stderr, "nobody watches"
    assert not files.errors.exists()


def test_one_at_a_time_requests_are_sent_in_the_order_of_the_file(tmp_path: Path) -> None:
    files = Files(tmp_path, 20)
    with running(FaultyServer()) as server:
        assert files.run(server.url, "--concurrency=1").returncode == 0
    assert server.prompts == files.custom_ids == files.answered()


def test_a_finished_batch_is_not_sent_again_and_needs_no_server(tmp_path: Path) -> None:
    files = Files(tmp_path, 3)
    with running(FaultyServer()) as server:
        assert files.run(server.url).returncode == 0
    before = files.output.read_bytes()
    finished = files.run(server.url)
    assert finished.returncode == 0
    assert "3 answered (3 of them earlier)" in finished.stderr
    assert files.output.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_batch_that_is_stopped_in_the_middle_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    files = Files(tmp_path, 40)

    async def hold(request: web.Request, prompt: str, _attempt: int) -> None:
        if int(prompt.partition("-")[2]) >= 20:
            await asyncio.Event().wait()

    with running(FaultyServer(hold)) as server:
        with started(files.command(server.url, "--concurrency=8")) as process:
            server.wait_for(28)  # the 20 that are answered, and all 8 places held
            process.send_signal(number)
            _, told = process.communicate(timeout=WAIT_SECONDS)
        if number == signal.SIGKILL:
            # As if it had died in the middle of a write.
            with files.output.open("ab") as file:
                file.write(b'{"id":"batch_req_0","custom_id":"request-39","respo')
        else:
            assert process.returncode == 128 + number
            assert "20 left" in told
            assert "run the same command again" in told
            assert sorted(files.answered()) == sorted(files.custom_ids[:20])
        server.act = None
        before = len(server.prompts)
        assert files.run(server.url, "--concurrency=8").returncode == 0
    files.check_complete()
    assert sorted(server.prompts[before:]) == sorted(files.custom_ids[20:])


def test_a_full_server_is_asked_again_when_it_said(tmp_path: Path) -> None:
    def busy(request: web.Request, prompt: str, attempt: int) -> web.Response | None:
        times.setdefault(prompt, []).append(asyncio.get_running_loop().time())
        if attempt > 1:
            return None
        status = 429 if prompt.endswith("0") else 503
        return web.json_response({"error": {"message": "full"}}, status=status, headers={"Retry-After": "1"})

    times: dict[str, list[float]] = {}
    files = Files(tmp_path, 4)
    with running(FaultyServer(busy)) as server:
        finished = files.run(server.url)
    assert finished.returncode == 0, finished.stderr
    assert "4 sent again" in finished.stderr
    files.check_complete()
    assert all(second - first >= 1 for first, second in times.values())


def test_torn_connections_and_a_restart_lose_nothing(tmp_path: Path) -> None:
    async def tear(request: web.Request, prompt: str, attempt: int) -> web.StreamResponse | None:
        if attempt > 1:
            return None
        assert request.transport is not None
        if prompt.endswith("1"):  # in the middle of the answer
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b'{"object"')
        request.transport.close()
        return web.Response()

    async def never(request: web.Request, _prompt: str, _attempt: int) -> None:
        await asyncio.Event().wait()

    files = Files(tmp_path, 4)
    with running(FaultyServer(never)) as first:
        process = subprocess.Popen(files.command(first.url), stderr=subprocess.PIPE, text=True)
        first.wait_for(4)
    try:
        with running(FaultyServer(tear, first.port)):
            _, told = process.communicate(timeout=WAIT_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, told
    files.check_complete()


def test_what_fails_is_kept_apart_and_tried_again_by_the_next_run(tmp_path: Path) -> None:
    def fail(request: web.Request, prompt: str, _attempt: int) -> web.Response | None:
        match prompt.partition("-")[2]:
            case "0":
                return web.json_response({"error": {"message": "bad", "code": "x"}}, status=400)
            case "1":
                return web.Response(status=500, text="not JSON\n")
            case "2":
                return web.Response(text="{torn")
        return None

    files = Files(tmp_path, 6)
    with running(FaultyServer(fail)) as server:
        finished = files.run(server.url, "--max-retries=0")
        assert finished.returncode == 1
        assert f"what failed is in {files.errors}" in finished.stderr
        assert sorted(files.answered()) == files.custom_ids[3:]
        failed = files.failed()
        assert sorted(failed) == files.custom_ids[:3]
        refused, broken, torn = (failed[custom_id] for custom_id in files.custom_ids[:3])
        assert refused["response"]["status_code"] == 400
        assert refused["response"]["body"] == {"error": {"message": "bad", "code": "x"}}
        assert broken["response"]["body"] == {"error": {"message": "not JSON\n"}}
        assert (torn["response"], torn["error"]["code"]) == (None, "invalid_response")

        before = len(server.prompts)
        assert files.run(server.url, "--no-retry-failed").returncode == 1
        assert len(server.prompts) == before
        assert files.failed() == failed

        server.act = None
        assert files.run(server.url).returncode == 0
    assert sorted(server.prompts[before:]) == files.custom_ids[:3]
    files.check_complete()
    assert not files.errors.exists()


def test_an_answer_that_does_not_come_in_time_has_failed(tmp_path: Path) -> None:
    async def never(request: web.Request, _prompt: str, _attempt: int) -> None:
        await asyncio.Event().wait()

    files = Files(tmp_path, 2)
    with running(FaultyServer(never)) as server:
        finished = files.run(server.url, "--timeout-seconds=3")
    assert finished.returncode == 1
    assert {line["error"]["code"] for line in files.failed().values()} == {"timeout"}
    assert len(server.prompts) == 2, "it would take as long again"


def test_a_server_that_is_gone_ends_the_run_instead_of_failing_every_line(tmp_path: Path) -> None:
    async def hold(request: web.Request, prompt: str, _attempt: int) -> None:
        if prompt != "request-0":
            await asyncio.Event().wait()

    files = Files(tmp_path, 30)
    with running(FaultyServer(hold)) as server:
        process = subprocess.Popen(
            files.command(server.url, "--max-retries=1", "--concurrency=2"), stderr=subprocess.PIPE, text=True
        )
        server.wait_for(3)
    try:
        _, told = process.communicate(timeout=WAIT_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "cannot be reached any more" in told
    assert "29 left" in told
    assert files.failed() == {}
    assert files.answered() == ["request-0"]


def test_a_connection_that_only_one_request_breaks_fails_that_request(tmp_path: Path) -> None:
    def tear(request: web.Request, prompt: str, _attempt: int) -> web.Response | None:
        if prompt != "request-1":
            return None
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    files = Files(tmp_path, 4)
    with running(FaultyServer(tear)) as server:
        assert files.run(server.url, "--max-retries=1").returncode == 1
    assert files.failed()["request-1"]["error"]["code"] == "connection_error"
    assert server.prompts.count("request-1") == 2
    assert sorted(files.answered()) == ["request-0", "request-2", "request-3"]


def test_files_that_cannot_be_used_are_told_before_anything_is_sent_or_written(tmp_path: Path) -> None:
    files = Files(tmp_path, 2)
    with running(FaultyServer()) as server:
        with files.source.open("a") as file:
            file.write("{\n" + request_line("request-0"))
        bad = files.run(server.url)
        assert (bad.returncode, files.output.exists()) == (2, False)
        assert f"{files.source}:3: " in bad.stderr
        assert f"{files.source}:4: custom_id 'request-0' is that of an earlier line" in bad.stderr

        files = Files(tmp_path, 2)
        for content in (b"my notes", b'{"id":"batch_req_1","custom_id":"elsewhere","response":null}\n'):
            files.output.write_bytes(content)
            assert files.run(server.url).returncode == 2
            assert files.output.read_bytes() == content
        same = subprocess.run(
            [*COMMAND, files.source, files.source], capture_output=True, timeout=WAIT_SECONDS, check=False
        )
        assert same.returncode == 2
        missing = subprocess.run([*COMMAND], capture_output=True, timeout=WAIT_SECONDS, check=False)
        assert missing.returncode == 2
        assert b"required" in missing.stderr
    assert server.prompts == []


def test_a_disk_that_is_full_ends_the_run_and_the_next_goes_on(tmp_path: Path) -> None:
    files = Files(tmp_path, 40)
    with running(FaultyServer()) as server:
        # Files may grow to 2048 bytes, which is inside of a line.
        limited = ["bash", "-c", 'ulimit -f 2; exec "$@"', "bash", *files.command(server.url)]
        finished = subprocess.run(limited, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
        assert finished.returncode == 1
        assert f"cannot write {files.output}: File too large" in finished.stderr
        assert "Traceback" not in finished.stderr
        assert files.output.stat().st_size == 2048
        assert files.run(server.url).returncode == 0
    files.check_complete()


def test_two_runs_cannot_write_the_same_output(tmp_path: Path) -> None:
    async def never(request: web.Request, _prompt: str, _attempt: int) -> None:
        await asyncio.Event().wait()

    files = Files(tmp_path, 2)
    with running(FaultyServer(never)) as server, started(files.command(server.url)):
        server.wait_for(2)
        second = files.run(server.url)
    assert second.returncode == 2
    assert "another `sfllm batch` is writing" in second.stderr


def test_without_a_server_the_command_says_so(tmp_path: Path) -> None:
    files = Files(tmp_path, 1)
    with running(FaultyServer()) as server:
        pass
    finished = files.run(server.url)
    assert finished.returncode == 1
    assert "no server answers at" in finished.stderr


def test_the_documented_batch_is_answered_by_a_real_stack(tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "batch.md").read_text(encoding="utf-8")
    example = re.search(r"```json\n(.*?)```", document, re.DOTALL)
    command = re.search(r"^sfllm (batch .*) --url \S+$", document, re.MULTILINE)
    assert example is not None
    assert command is not None
    (tmp_path / "questions.jsonl").write_text(example[1])
    with mock_stack() as url:
        finished = subprocess.run(
            [sys.executable, "-m", "sfllm_cli", *command[1].split(), "--url", url],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
    assert finished.returncode == 0, finished.stderr
    found = {line["custom_id"]: line["response"] for line in lines(tmp_path / "answers.jsonl")}
    assert {name: answer["body"]["object"] for name, answer in found.items()} == {
        "one": "chat.completion",
        "two": "text_completion",
    }
    assert all(answer["request_id"] for answer in found.values())
    assert " 24 output tokens" in finished.stderr


@contextmanager
def mock_stack() -> Iterator[str]:
    """`sfllm serve` with made-up tokens; its address."""
    command = [sys.executable, "-m", "sfllm_cli", "serve", "--mock", "--port=0", "--model=no/such-model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            ready = re.compile(r"sfllm serves mock at (\S+)")
            yield next(found[1] for line in process.stdout if (found := ready.search(line)))
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=WAIT_SECONDS)
