"""Gateway, scheduler and worker as processes that know each other by keys, and strangers among them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from chaos.ports import free_ports

from sfllm.link_keys import add_link_key, key_file, make_link_keys

PATIENCE_SECONDS = 60.0
LINKS = {"scheduler": ("gateway", "worker", "asset"), "gateway": ("gateway", "asset")}
LINKS["worker"] = ("worker", "asset")
HF_TOKEN = "hf_neverShownAnywhere"
API_KEY = "sk-neverShownEither"


class Services:
    """Processes on loopback; each is known by a name, which its log has too."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder, folder / "keys"
        make_link_keys(self.keys)
        first = free_ports(12)[0]
        self._links = {link: first + index for index, link in enumerate(LINKS["scheduler"])}
        self.api = first + 3
        self._ports = iter(range(first + 4, first + 12))
        self._admin: dict[str, int] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, service: str, *flags: str, keys: str | None = None, to: str = "") -> None:
        """Start a service, with its role's keys unless told others (`none` for none).

        `to` is the link whose address it gets for its own.
        """
        if name not in self._admin:
            self._admin[name] = next(self._ports)
        ports = {link: self._links[to if to and link == service else link] for link in LINKS[service]}
        command = [sys.executable, "-m", f"sfllm_{service}", f"--admin-port={self._admin[name]}"]
        command += [f"--{link}-address=tcp://127.0.0.1:{port}" for link, port in ports.items()]
        if keys != "none":
            command.append(f"--link-keys={key_file(self.keys, keys or service)}")
        if service == "worker":
            command += ["--mock", "--served-model-name=m"]
        if service == "gateway":
            command.append(f"--port={self.api}")
        environment = {**os.environ, "HF_TOKEN": HF_TOKEN, "SFLLM_API_KEY": API_KEY}
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*command, "--log-level=debug", *flags], stderr=log, env=environment
            )

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        process = self._processes.pop(name)
        process.send_signal(number)
        return process.wait(PATIENCE_SECONDS)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait_for_log(self, name: str, text: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.log(name):
            assert time.monotonic() < deadline, f"{name} never says {text!r}:\n{self.log(name)}"
            time.sleep(0.05)

    def metrics(self, name: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._admin[name]}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def metric(self, name: str, key: str) -> float:
        lines = [line.rpartition(" ") for line in self.metrics(name).splitlines()]
        return next(float(value) for found, _, value in lines if found == f"sfllm:{key}")

    def wait_for_metric(self, name: str, key: str, least: float) -> None:
        self.wait_for_sum(name, (key,), least)

    def wait_for_sum(self, name: str, keys: Sequence[str], least: float) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (seen := sum(self.metric(name, key) for key in keys)) < least:
            assert time.monotonic() < deadline, f"{keys} make {seen}, not {least}"
            time.sleep(0.05)

    def complete(self) -> str:
        """An answer of five tokens, as soon as somebody serves the model."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        body = json.dumps({"model": "m", "prompt": "hi", "max_tokens": 5, "seed": 1}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
        while True:
            request = urllib.request.Request(f"http://127.0.0.1:{self.api}/v1/completions", body, headers)
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return str(json.load(answer)["choices"][0]["text"])
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(PATIENCE_SECONDS)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    made = Services(tmp_path)
    yield made
    made.close()


@pytest.fixture
def stack(services: Services) -> Services:
    """All three, which serve."""
    for service in LINKS:
        services.start(service, service)
    services.complete()
    return services


def test_strangers_are_refused_and_told_and_the_others_never_notice(stack: Services) -> None:
    make_link_keys(stack.keys / "foreign")
    add_link_key(stack.keys / "foreign", "worker", "x")
    refused = "scheduler_links_refused_total"
    strangers = {
        "without keys": {"keys": "none"},
        "with foreign keys": {"keys": "foreign/worker"},
        "with the scheduler's key of others": {"keys": "foreign/worker-x"},
        "at the gateways' door": {"to": "gateway"},
    }
    for count, (name, given) in enumerate(strangers.items(), 1):
        stack.start(name, "worker", **given)
        stack.wait_for_log(name, "refused by the scheduler")
        stack.wait_for_sum(
            "scheduler", [f'{refused}{{socket="{link}"}}' for link in LINKS["scheduler"]], count
        )
    stack.start("gateway as worker", "worker", keys="gateway")
    assert stack._processes["gateway as worker"].wait(PATIENCE_SECONDS) == 2
    assert "of a gateway, not of a worker" in stack.log("gateway as worker")
    assert stack.metric("scheduler", 'workers{state="serving"}') == 1
    assert "malformed" not in stack.log("scheduler")
    assert stack.complete()


def test_a_worker_whose_key_is_added_is_let_in_and_one_whose_key_is_taken_is_not(stack: Services) -> None:
    scheduler_file = key_file(stack.keys, "scheduler")
    before = scheduler_file.read_text()
    add_link_key(stack.keys, "worker", "late")
    known = scheduler_file.read_text()
    scheduler_file.write_text(before)
    stack.start("late", "worker", keys="worker-late")
    stack.wait_for_log("late", "refused by the scheduler")
    scheduler_file.write_text(known)
    stack.wait_for_metric("scheduler", 'workers{state="serving"}', 2)
    assert stack.stop("late") == 0
    scheduler_file.write_text(before)
    stack.start("late again", "worker", keys="worker-late")
    stack.wait_for_log("late again", "does not know this process's key")
    scheduler_file.write_text("nonsense")
    stack.start("third", "worker")
    stack.wait_for_metric("scheduler", 'workers{state="serving"}', 2)  # by the keys as they were
    assert "link keys stay as they were" in stack.log("scheduler")


def open_stream(stack: Services, tokens: int) -> http.client.HTTPResponse:
    """A streamed completion of so many tokens, always the same ones, that has begun."""
    body = {"model": "m", "prompt": "hi", "max_tokens": tokens, "ignore_eos": True, "seed": 1, "stream": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
    connection = http.client.HTTPConnection("127.0.0.1", stack.api, timeout=PATIENCE_SECONDS)
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    assert answer.status == http.client.OK
    return answer


def text_of(stream: http.client.HTTPResponse) -> str:
    """All that it says, read to its end."""
    with stream:
        *lines, last = [line for line in stream.read().decode().splitlines() if line]
    assert last == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_a_worker_whose_key_is_taken_away_loses_its_place_and_its_requests_move(services: Services) -> None:
    for name in ("scheduler", "gateway"):
        services.start(name, name)
    for name in ("first", "second"):
        add_link_key(services.keys, "worker", name)
        services.start(name, "worker", "--mock-tokens-per-second=100", keys=f"worker-{name}")
    services.complete()
    services.wait_for_metric("scheduler", 'workers{state="serving"}', 2)
    streams = [open_stream(services, 500) for _ in range(6)]
    file = key_file(services.keys, "scheduler")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith('"worker-first"')))
    texts = {text_of(stream) for stream in streams}
    assert services.metric("scheduler", 'request_migrations_total{cause="drain"}') >= 1
    assert len(texts) == 1
    assert texts.pop().startswith(text_of(open_stream(services, 20)))
    assert "cut off: its key was taken away" in services.log("scheduler")
    assert services.metric("scheduler", 'workers{state="serving"}') == 1
    services.wait_for_log("first", "does not know this process's key")


def test_a_gateway_whose_key_is_taken_away_is_cut_off_until_it_is_given_back(stack: Services) -> None:
    assert stack.complete()
    file = key_file(stack.keys, "scheduler")
    known = file.read_text()
    file.write_text("".join(line for line in known.splitlines(True) if not line.startswith('"gateway"')))
    stack.wait_for_log("scheduler", "gateway lost")
    stack.wait_for_log("gateway", "does not know this process's key")
    assert stack.metric("scheduler", 'workers{state="serving"}') == 1
    file.write_text(known)
    assert stack.complete()


def test_a_scheduler_that_was_killed_gets_all_back_with_the_same_keys(stack: Services) -> None:
    text = stack.complete()
    assert stack.stop("scheduler", signal.SIGKILL) == -signal.SIGKILL
    stack.start("scheduler", "scheduler")
    assert stack.complete() == text
    assert stack.metric("scheduler", "links_encrypted") == 1
    assert stack.metric("gateway", "links_encrypted") == 1
    assert stack.metric("worker", "links_encrypted") == 1


def test_no_secret_is_shown_by_logs_metrics_errors_or_the_list_of_processes(stack: Services) -> None:
    secrets = [HF_TOKEN, API_KEY]
    for role in LINKS:
        text = key_file(stack.keys, role).read_text()
        secrets.append(text.split('secret-key = "')[1][:40])
    shown = [stack.log(name) + stack.metrics(name) for name in LINKS]
    shown += [Path(f"/proc/{stack.pid(name)}/cmdline").read_text() for name in LINKS]
    body = json.dumps({"model": "m", "prompt": 5, "max_tokens": "x"}).encode()
    for headers in ({"Authorization": f"Bearer {API_KEY}"}, {"Authorization": f"Bearer {API_KEY}x"}):
        request = urllib.request.Request(f"http://127.0.0.1:{stack.api}/v1/completions", body, headers)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=30)
        shown.append(error.value.read().decode())
    for secret in secrets:
        assert not any(secret in text for text in shown)


@pytest.mark.parametrize(
    ("service", "flags", "wanted"),
    [
        ("scheduler", ["--worker-address=tcp://0.0.0.0:1"], "--link-keys"),
        ("scheduler", ["--asset-address=tcp://*:1"], "--link-keys"),
        ("scheduler", ["--gateway-address=tcp://[::]:1"], "--link-keys"),
        ("worker", ["--worker-address=tcp://scheduler.internal:1"], "--link-keys"),
        ("gateway", ["--gateway-address=tcp://10.0.0.1:1"], "--link-keys"),
        ("gateway", ["--host=0.0.0.0"], "--allow-anonymous"),
        ("gateway", ["--host=::"], "--allow-anonymous"),
    ],
)
def test_nothing_goes_beyond_this_machine_without_keys_or_a_flag(
    service: str, flags: list[str], wanted: str
) -> None:
    command = [sys.executable, "-m", f"sfllm_{service}", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert ended.returncode == 2
    assert wanted in ended.stderr
    assert "Traceback" not in ended.stderr
