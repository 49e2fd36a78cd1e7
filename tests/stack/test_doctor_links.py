"""`sfllm doctor` on services whose links have keys: all of one set, a stranger, and one without any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import Services

from sfllm.link_keys import key_file, make_link_keys
from sfllm_cli.doctor.findings import Finding
from sfllm_cli.main import main

WORKER = ("--mock", "--served-model-name=mock")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_link_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def services(tmp_path: Path, keys: Path) -> Iterator[Services]:
    made = Services(tmp_path)
    for service, flags in (("scheduler", ()), ("worker", WORKER), ("gateway", (f"--port={made.api}",))):
        made.start(service, service, f"--link-keys={key_file(keys, service)}", *flags)
    made.wait("gateway", lambda seen: seen[0] == 200)
    yield made
    made.close()


def doctor(services: Services, folder: Path, *flags: str) -> tuple[int, dict[str, Finding]]:
    """Its exit code and its findings by the name of their check."""
    file = folder / "findings.json"
    command = ["doctor", f"--url=http://127.0.0.1:{services.api}", f"--json={file}", *flags]
    code = main([*command, "--admin", *services.admin.values()])
    found = (Finding(**each) for each in json.loads(file.read_text())["findings"])
    return code, {each.check: each for each in found}


def test_links_with_keys_strangers_and_processes_without_keys_are_told(
    services: Services, keys: Path, tmp_path: Path
) -> None:
    code, found = doctor(services, tmp_path, "--sample-seconds=0", f"--link-keys={keys}")
    assert code == 0
    assert "3 processes encrypt them" in found["encryption of links"].meaning
    assert "whom the scheduler lets in" in found[f"link keys in {key_file(keys, 'worker')}"].meaning

    make_link_keys(tmp_path / "other")
    services.start("stranger", "worker", f"--link-keys={key_file(tmp_path / 'other', 'worker')}", *WORKER)
    services.start("plain", "worker", *WORKER)
    for name in ("stranger", "plain"):
        services.wait(name, lambda seen: seen[0] == 503)
    # A stranger tries again at least every second.
    code, found = doctor(services, tmp_path, "--sample-seconds=3")
    assert code == 1
    plain = found["encryption of links"]
    assert (plain.status, services.admin["plain"] in plain.meaning) == ("problem", True)
    assert services.admin["stranger"] not in plain.meaning
    (peers,) = [each for name, each in found.items() if name.startswith("peers of scheduler")]
    assert (peers.status, "refused for their keys" in peers.meaning) == ("problem", True)
    assert found["workers of mock"].meaning == "1 can serve it"
