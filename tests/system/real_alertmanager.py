"""An Alertmanager of the system's package, and a receiver of its webhooks that keeps what comes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from chaos.ports import free_ports
from observability import PROMETHEUS, Alert, faster
from real_prometheus import wait_until_ready

WAIT_SECONDS = 90
PROGRAM = "prometheus-alertmanager"
CONFIGURATION = PROMETHEUS / "alertmanager.yaml"


class Alertmanager(NamedTuple):
    """An Alertmanager that runs, as Prometheus and as people reach it."""

    address: str

    def alerts(self) -> list[dict[str, Any]]:
        """Every alert that it holds now, with what inhibits it."""
        with urllib.request.urlopen(f"http://{self.address}/api/v2/alerts", timeout=20) as answer:
            found: list[dict[str, Any]] = json.load(answer)
            return found

    def inhibited(self) -> set[Alert]:
        """Those that it keeps to itself because another one fires."""
        return {
            Alert(each["labels"]["alertname"], each["labels"].get("job", ""))
            for each in self.alerts()
            if each["status"]["inhibitedBy"]
        }


class Notice(NamedTuple):
    """One alert within a message of the webhook."""

    path: str
    status: str
    alert: Alert
    labels: dict[str, str]
    annotations: dict[str, str]


class Webhook:
    """Listens on a port of its own from construction until `close`."""

    def __init__(self) -> None:
        self._notices: list[Notice] = []
        self._changed = threading.Condition()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                webhook._take(self.path, message)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def notices(self) -> list[Notice]:
        """What has come so far."""
        with self._changed:
            return list(self._notices)

    def wait_for(self, name: str, status: str, why: Callable[[], str]) -> Notice:
        """The first notice of an alert with that status, `firing` or `resolved`, as soon as it is there."""

        def found() -> Notice | None:
            return next((n for n in self._notices if n.alert.name == name and n.status == status), None)

        with self._changed:
            if not self._changed.wait_for(lambda: found() is not None, WAIT_SECONDS):
                came = sorted({(notice.alert.name, notice.status) for notice in self._notices})
                raise AssertionError(f"{name} was not {status} in time; came: {came}\n{why()}")
            notice = found()
            assert notice is not None
            return notice

    def _take(self, path: str, message: dict[str, Any]) -> None:
        with self._changed:
            for each in message["alerts"]:
                labels = each["labels"]
                alert = Alert(labels["alertname"], labels.get("job", ""))
                self._notices.append(Notice(path, each["status"], alert, labels, each["annotations"]))
            self._changed.notify_all()


@contextmanager
def alertmanager(directory: Path, receiver: str, factor: int) -> Iterator[Alertmanager]:
    """Run one with the deployed configuration, its waits divided by `factor`, which tells `receiver`."""
    program = shutil.which(PROGRAM)
    assert program is not None
    text = CONFIGURATION.read_text().replace("alert-receiver:8080", receiver)
    text = re.sub(
        r"(group_wait|group_interval|repeat_interval): (\w+)",
        lambda match: f"{match[1]}: {faster(match[2], factor)}",
        text,
    )
    assert yaml.safe_load(text)["route"]["group_wait"] != "1m"
    configuration = directory / "alertmanager.yaml"
    configuration.write_text(text)
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    command = [
        *(program, f"--config.file={configuration}", f"--storage.path={directory / 'alertmanager'}"),
        *(f"--web.listen-address={address}", "--cluster.listen-address="),
    ]
    log = directory / "alertmanager.log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            wait_until_ready(f"http://{address}", process, log)
            yield Alertmanager(address)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
