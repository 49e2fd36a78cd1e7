"""Who is let in: keys by file and by setting, their changes while the gateway runs, and who they name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import requests
from fake_scheduler import FakeScheduler, Script
from gateway_process import GatewayProcess
from http_client import error, events, post, wait_until
from openai import OpenAI

from sfllm.api_keys import hash_of, key_line
from sfllm.messages import Submit
from sfllm_gateway.keys import CHECK_SECONDS

KEY = "sk-the-key-of-team-a"
QUICK = "sk-a-key-without-a-name"
X = {"prompt": "say:hello"}
GUARDED = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/generate"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/get_model_info"),
    ("GET", "/get_server_info"),
    ("GET", "/load"),
    ("GET", "/health/"),
    ("GET", "/no/such/path"),
]
OPEN = ["/health", "/ping", "/ready", "/metrics", "/version", "/openapi.json", "/docs"]


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text("# who may use it\n" + key_line("team-a", KEY))
    return file


@pytest.fixture(scope="module")
def closed_gateway(scheduler: FakeScheduler, key_file: Path) -> Iterator[GatewayProcess]:
    process = GatewayProcess(
        *(scheduler, f"--api-key-file={key_file}", "--log-level=debug"),
        variables={"SFLLM_API_KEY": f"{QUICK},sk-another"},
    )
    process.wait_ready()
    yield process
    code, log = process.stop()
    assert code == 0, log
    assert "Traceback" not in log, log
    assert KEY not in log
    assert QUICK not in log


@pytest.fixture
def closed(closed_gateway: GatewayProcess, scheduler: FakeScheduler) -> GatewayProcess:
    """A gateway that asks for a key, with the scheduler's script as it is at first."""
    scheduler.script = Script()
    scheduler.seen.clear()
    return closed_gateway


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def models(gateway: GatewayProcess, key: str) -> int:
    return requests.get(f"{gateway.url}/v1/models", headers=bearer(key), timeout=20).status_code


def tenant(scheduler: FakeScheduler) -> str:
    submit = scheduler.wait_for(Submit)[-1]
    assert isinstance(submit, Submit)
    return submit.tenant


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize("headers", [{}, bearer("sk-wrong"), bearer(KEY + "x"), {"x-api-key": "sk-wrong"}])
def test_without_a_known_key_nothing_is_served(
    closed: GatewayProcess, scheduler: FakeScheduler, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = requests.request(method, closed.url + path, json=X, headers=headers, timeout=20)
    found = error(answer, 401)
    assert (found["type"], found["code"], found["param"]) == ("authentication_error", "invalid_api_key", None)
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.headers["X-Request-Id"]
    assert "wrong" not in answer.text
    assert not [message for message in scheduler.seen if isinstance(message, Submit)]


@pytest.mark.parametrize("path", OPEN)
def test_probes_monitoring_and_documentation_need_no_key(closed: GatewayProcess, path: str) -> None:
    assert requests.get(closed.url + path, timeout=20).status_code == 200


@pytest.mark.parametrize("headers", [bearer(KEY), {"x-api-key": KEY}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_key_of_the_file_is_let_in_and_its_name_is_the_tenant(
    closed: GatewayProcess, scheduler: FakeScheduler, headers: dict[str, str], stream: bool
) -> None:
    answer = post(closed, "/v1/completions", {**X, "stream": stream}, headers=headers)
    found = events(answer) if stream else [answer.json()]
    assert "".join(choice["text"] for event in found for choice in event["choices"]) == "hello"
    assert tenant(scheduler) == "team-a"


def test_a_key_of_the_settings_is_let_in_and_named_by_its_hash(
    closed: GatewayProcess, scheduler: FakeScheduler
) -> None:
    assert post(closed, "/v1/completions", X, headers=bearer(QUICK)).status_code == 200
    assert tenant(scheduler) == hash_of(QUICK.encode()).hex()[:16]
    assert models(closed, "sk-another") == 200


def test_a_refused_stream_is_a_plain_answer(closed: GatewayProcess) -> None:
    error(post(closed, "/v1/completions", {**X, "stream": True}), 401)


def test_openai_clients_see_an_authentication_error(closed: GatewayProcess) -> None:
    def client(key: str) -> OpenAI:
        return OpenAI(base_url=f"{closed.url}/v1", api_key=key, max_retries=0, timeout=20)

    answer = client(KEY).completions.create(model="tiny", prompt="say:hello")
    assert answer.choices[0].text == "hello"
    with pytest.raises(openai.AuthenticationError) as refused:
        client("sk-wrong").completions.create(model="tiny", prompt="say:hello")
    assert refused.value.code == "invalid_api_key"


def test_keys_are_not_to_be_seen_from_outside(closed: GatewayProcess) -> None:
    command = Path(f"/proc/{closed.process.pid}/cmdline").read_bytes().decode()
    shown = requests.get(f"{closed.url}/metrics", timeout=20).text + command
    info = requests.get(f"{closed.url}/get_server_info", headers=bearer(KEY), timeout=20).text
    assert KEY not in shown + info
    assert QUICK not in shown + info


def test_a_changed_file_counts_at_once_and_a_broken_one_not_at_all(
    start: Callable[..., GatewayProcess], scheduler: FakeScheduler, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(key_line("a", "sk-first"))
    gateway = start(scheduler, f"--api-key-file={file}")
    gateway.wait_ready()
    assert (models(gateway, "sk-first"), models(gateway, "sk-second")) == (200, 401)

    file.write_text(key_line("a", "sk-second"))
    wait_until(lambda: models(gateway, "sk-second") == 200, "the new key is let in", 20)
    assert models(gateway, "sk-first") == 401

    for broken in ("", "b:sk-a-key-that-somebody-forgot-to-hash\n", key_line("a", "sk-first")[:-2]):
        before = gateway.log().count("API keys stay as they were")
        file.write_text(broken)
        wait_until(
            lambda before=before: (  # type: ignore[misc]  # mypy cannot infer a lambda with a default
                models(gateway, "sk-second") == 200
                and gateway.log().count("API keys stay as they were") > before
            ),
            "the broken file is told of",
            20,
        )
        file.write_text(key_line("a", "sk-second"))
        read = gateway.log().count("API keys read again")
        wait_until(
            lambda read=read: (  # type: ignore[misc]  # as above
                models(gateway, "sk-second") == 200 and gateway.log().count("API keys read again") > read
            ),
            "the mended file is read",
            20,
        )
    assert "forgot-to-hash" not in gateway.log()

    file.write_text("# nobody\n")
    wait_until(lambda: models(gateway, "sk-second") == 401, "nobody is let in", 20)


def test_a_file_that_is_gone_keeps_its_keys_and_its_successor_is_read(
    start: Callable[..., GatewayProcess], scheduler: FakeScheduler, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(key_line("a", "sk-first"))
    gateway = start(scheduler, f"--api-key-file={file}")
    gateway.wait_ready()
    file.unlink()
    wait_until(
        lambda: models(gateway, "sk-first") == 200 and "API keys stay as they were" in gateway.log(),
        "the loss is told of",
        20,
    )
    end = time.monotonic() + 3 * CHECK_SECONDS
    while time.monotonic() < end:
        assert models(gateway, "sk-first") == 200
    assert gateway.log().count("API keys stay as they were") == 1
    successor = tmp_path / "new"
    successor.write_text(key_line("a", "sk-second"))
    successor.replace(file)
    wait_until(lambda: models(gateway, "sk-second") == 200, "the new file is read", 20)


@pytest.mark.parametrize("content", [None, "", "team-a sk-in-plain\n"])
def test_a_gateway_does_not_start_with_a_file_that_it_cannot_use(
    start: Callable[..., GatewayProcess], scheduler: FakeScheduler, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    gateway = start(scheduler, f"--api-key-file={file}")
    assert gateway.process.wait(20) == 2
    assert f"--api-key-file {file}: " in gateway.log()
    assert "Traceback" not in gateway.log()
    assert "sk-in-plain" not in gateway.log()


def test_a_key_on_the_command_line_is_warned_of(
    start: Callable[..., GatewayProcess], scheduler: FakeScheduler
) -> None:
    gateway = start(scheduler, "--api-key=sk-shown")
    gateway.wait_ready()
    assert "set SFLLM_API_KEY instead" in gateway.log()
    assert "sk-shown" not in gateway.log()
    assert (models(gateway, "sk-shown"), models(gateway, "sk-other")) == (200, 401)
