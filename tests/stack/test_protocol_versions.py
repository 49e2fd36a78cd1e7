"""Processes of two protocol versions: neither harms the other, and each says why they cannot meet."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import NEWER, PATIENCE_SECONDS, Services

from sfllm.wire import PROTOCOL_VERSION
from sfllm_cli.main import main

STREAM_TOKENS = 400

OLD_MEETS_NEW = f"peer speaks protocol version {PROTOCOL_VERSION + 1}, this process {PROTOCOL_VERSION}"
NEW_MEETS_OLD = f"peer speaks protocol version {PROTOCOL_VERSION}, this process {PROTOCOL_VERSION + 1}"


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    made = Services(tmp_path)
    yield made
    made.close()


def test_newer_processes_harm_no_stream_of_older_ones_and_say_what_they_wait_for(
    services: Services, tmp_path: Path
) -> None:
    api, newer_api = services.api, services.newer_api
    worker = ("--mock", "--mock-tokens-per-second=200", "--served-model-name=mock")
    services.start("scheduler", "scheduler")
    services.start("worker", "worker", *worker)
    services.start("gateway", "gateway", f"--port={api}")
    services.wait("gateway", lambda seen: seen[0] == 200)

    body = {"model": "mock", "prompt": "x", "stream": True, "max_tokens": STREAM_TOKENS, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{api}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as stream:
        stream.readline()
        services.start("newer worker", "worker", *worker, changed=NEWER)
        services.start("newer gateway", "gateway", f"--port={newer_api}", changed=NEWER)
        for name in ("newer worker", "newer gateway"):
            services.wait(name, lambda seen: seen == (503, f"{NEW_MEETS_OLD}: upgrade one"))
            assert services.log(name).count("cannot be talked to") == 1
        text = stream.read().decode()
    assert text.count('"finish_reason":"length"') == 1
    assert text.endswith("data: [DONE]\n\n")
    assert OLD_MEETS_NEW in services.log("scheduler")
    assert services.ready("gateway") == services.ready("worker") == (200, "")

    findings = tmp_path / "findings.json"
    flags = [f"--url=http://127.0.0.1:{api}", "--sample-seconds=0", f"--json={findings}"]
    assert main(["doctor", *flags, "--admin", *services.admin.values()]) == 1
    (found,) = [each for each in json.loads(findings.read_text())["findings"] if each["check"] == "protocol"]
    assert found["status"] == "problem"
    older, newer = found["meaning"].partition(f"; {PROTOCOL_VERSION + 1}: ")[::2]
    for name, address in services.admin.items():
        assert address in (newer if name.startswith("newer") else older)

    # The scheduler is what the others follow: no newer process has to be started again.
    services.stop("scheduler")
    services.start("scheduler", "scheduler", changed=NEWER)
    services.wait("newer gateway", lambda seen: seen[0] == 200)
    services.wait("newer worker", lambda seen: seen[0] == 200)
    for name in ("worker", "gateway"):
        services.wait(name, lambda seen: seen == (503, f"{OLD_MEETS_NEW}: upgrade one"))
