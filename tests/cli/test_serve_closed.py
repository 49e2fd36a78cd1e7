"""`sfllm serve` behind keys and HTTPS: it gets ready, and shows how to ask without showing a key."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import requests

from sfllm.api_keys import key_line

END_SECONDS = 30
CERTIFICATE = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
    "-addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
)


@pytest.mark.parametrize("named", [True, False])
def test_a_closed_server_gets_ready_and_tells_how_to_present_a_key(tmp_path: Path, named: bool) -> None:
    subprocess.run(CERTIFICATE.split(), cwd=tmp_path, check=True, capture_output=True, timeout=60)
    (tmp_path / "keys").write_text(key_line("a", "sk-of-the-file"))
    flags: Sequence[str] = ["--tls-cert-file=cert.pem", "--tls-key-file=key.pem"]
    environment = {**os.environ, "SFLLM_API_KEY": "sk-of-the-variable"}
    if named:
        flags = [*flags, "--api-key-file=keys"]
        del environment["SFLLM_API_KEY"]
    command = [sys.executable, "-m", "sfllm_cli", "serve", "--mock", "--port=0", "--model=no/such-model"]
    with subprocess.Popen(
        [*command, *flags],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            printed = "".join(iter(process.stdout.readline, "\n"))
            ready = process.stdout.readline()
            assert f"sfllm serves {'its model' if named else 'mock'} at https://" in ready, printed
            shown = ready + "".join(process.stdout.readline() for _ in range(3))
            assert '"Authorization: Bearer $SFLLM_API_KEY"' in shown
            url = re.search(r"https://127\.0\.0\.1:\d+", ready)
            assert url is not None
            key = "sk-of-the-file" if named else "sk-of-the-variable"
            headers = {"Authorization": f"Bearer {key}"}
            verify = str(tmp_path / "cert.pem")
            answer = requests.get(f"{url[0]}/v1/models", headers=headers, verify=verify, timeout=20)
            assert answer.json()["data"][0]["id"] == "mock"
            assert requests.get(f"{url[0]}/v1/models", verify=verify, timeout=20).status_code == 401
        finally:
            process.send_signal(signal.SIGTERM)
            rest, log = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 0, log
    assert key not in printed + shown + rest + log
