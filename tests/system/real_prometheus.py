"""A Prometheus of the system's package, which scrapes a fleet of processes with the deployed rules."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from chaos.ports import free_ports
from observability import PROMETHEUS

START_SECONDS = 60
SCRAPE_INTERVAL = "1s"


class Prometheus:
    """A Prometheus that runs."""

    def __init__(self, url: str) -> None:
        self._url = url

    def has_data(self, expression: str) -> bool:
        """Whether an expression has a value now that is a number."""
        answer = self.get("query", query=expression)
        return any(not math.isnan(float(sample["value"][1])) for sample in answer["result"])

    def labels(self, metric: str) -> set[str]:
        """The labels that any series of a metric has; empty without a series."""
        return {label for series in self.get("series", **{"match[]": metric}) for label in series}

    def get(self, what: str, **parameters: str) -> Any:
        """The data that an endpoint of the API answers with."""
        address = f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=20) as answer:
            return json.load(answer)["data"]


@contextmanager
def prometheus(
    directory: Path,
    targets: Mapping[str, Sequence[str]],
    rules: Path = PROMETHEUS / "rules",
    alertmanager: str | None = None,
    deployed: str = "prometheus.yaml",
) -> Iterator[Prometheus]:
    """Run one with a `deployed` configuration; `targets` has the addresses of each job.

    `rules` is the folder of its rules, `alertmanager` the `host:port` that it sends alerts to.
    """
    program = shutil.which("prometheus")
    assert program is not None
    configuration = directory / "prometheus.yaml"
    configuration.write_text(yaml.safe_dump(_configuration(targets, rules, alertmanager, deployed)))
    (port,) = free_ports(1)
    command = [
        *(program, f"--config.file={configuration}", f"--storage.tsdb.path={directory / 'data'}"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    log = directory / "prometheus.log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", process, log)
            yield Prometheus(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _configuration(
    targets: Mapping[str, Sequence[str]], rules: Path, alertmanager: str | None, deployed: str
) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((PROMETHEUS / deployed).read_text())
    found["global"] = {"scrape_interval": SCRAPE_INTERVAL}
    if "rule_files" in found:
        found["global"]["evaluation_interval"] = SCRAPE_INTERVAL
        assert found["rule_files"] == ["rules/*.yaml"]
        found["rule_files"] = [str(rules / "*.yaml")]
        (receiver,) = found["alerting"]["alertmanagers"]
        del receiver["dns_sd_configs"]
        receiver["static_configs"] = [{"targets": [alertmanager] if alertmanager else []}]
    assert {job["job_name"] for job in found["scrape_configs"]} == set(targets)
    for job in found["scrape_configs"]:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": list(targets[job["job_name"]])}]
    return found


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until Prometheus or Alertmanager at that address is ready; fails with its log if it ends."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{url}/-/ready", timeout=5).close()
        except OSError:
            ended = process.poll() is not None or time.monotonic() > deadline
            assert not ended, f"it does not start:\n{log.read_text()[-3000:]}"
            time.sleep(0.1)
        else:
            return
