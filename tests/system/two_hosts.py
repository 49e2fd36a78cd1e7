"""Two hosts that share nothing but a network: each has a Docker engine of its own, which gets the images.

Workers are mocks, in an image that is the scheduler's and the package of workers: nobody needs torch here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from docker_engine import Engine, private_engine
from namespaces import Network, Place, leftovers, network

ROOT = Path(__file__).parents[2]
MOCK_WORKER = """\
FROM sfllm-scheduler
COPY . /opt/worker
ENV PYTHONPATH=/opt/worker
ENTRYPOINT ["python3", "-m", "sfllm_worker"]
"""
IMAGES = ("sfllm-scheduler", "sfllm-gateway", "sfllm-worker-mock")
PIECE_BYTES = 2**20
LOAD_SECONDS = 300.0
LEAVE_SECONDS = 20.0


@dataclass(frozen=True)
class Host:
    """A place on the network, and the engine that runs there. `directory` is shared with nobody."""

    place: Place
    engine: Engine
    directory: Path

    @property
    def address(self) -> str:
        return self.place.address


@dataclass(frozen=True)
class TwoHosts:
    """Host `a` is the scheduler's, host `b` has workers only."""

    network: Network
    a: Host
    b: Host


@contextmanager
def two_hosts(source: Engine) -> Iterator[TwoHosts]:
    """Both hosts, with the images of `source`; at the end nothing of them is left, or that is an error.

    Raises `NetworkUnavailableError` or `EngineUnavailableError`.
    """
    # A short name, as socket files need.
    directory = Path(tempfile.mkdtemp(prefix="sfllm-hosts-"))
    prefix = ""
    try:
        with network(("a", "b")) as made:
            prefix = made.prefix
            try:
                with ExitStack() as engines:
                    hosts = [_host(place, directory / place.name, engines) for place in made.places]
                    _bring_images(source, hosts)
                    yield TwoHosts(made, *hosts)
            finally:
                _expect_nothing(made.inhabitants)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if prefix:
            _expect_nothing(lambda: leftovers(prefix, str(directory)))


def _host(place: Place, directory: Path, engines: ExitStack) -> Host:
    """Its disk is memory: images are written once and read once, and are gone when the engine is."""
    disk = directory / "data"
    disk.mkdir(parents=True)
    mounted = ("sh", "-c", f'mount -t tmpfs -o mode=0711 tmpfs {disk} && exec "$@"', "sh")
    engine = engines.enter_context(private_engine(directory, (*place.within, *mounted)))
    return Host(place, engine, directory)


def _bring_images(source: Engine, hosts: Sequence[Host]) -> None:
    """Load the images into the engines of the hosts. They are read once: they may be large."""
    with tempfile.TemporaryDirectory() as context:
        # Both packages, so that they fit together whenever the scheduler's image was built.
        for package in (ROOT / "shared" / "sfllm", ROOT / "services" / "worker" / "sfllm_worker"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(package, Path(context, package.name), ignore=ignored)
        Path(context, "Dockerfile").write_text(MOCK_WORKER)
        source.run("build", "--quiet", "--tag", "sfllm-worker-mock", context)
    with ExitStack() as processes:
        loading = [
            processes.enter_context(
                subprocess.Popen(
                    ("docker", "load", "--quiet"), env=_environment(host.engine), stdin=subprocess.PIPE
                )
            )
            for host in hosts
        ]
        saving = processes.enter_context(
            subprocess.Popen(("docker", "save", *IMAGES), env=_environment(source), stdout=subprocess.PIPE)
        )
        assert saving.stdout is not None
        while piece := saving.stdout.read(PIECE_BYTES):
            for each in loading:
                assert each.stdin is not None
                each.stdin.write(piece)
        for each in loading:
            each.communicate(timeout=LOAD_SECONDS)
    assert [each.returncode for each in (saving, *loading)] == [0] * (1 + len(loading))
    for host in hosts:
        host.engine.run("tag", "sfllm-worker-mock", "sfllm-worker")


def _environment(engine: Engine) -> dict[str, str]:
    return {**os.environ, **({"DOCKER_HOST": engine.host} if engine.host else {})}


def _expect_nothing(found: Callable[[], list[str]]) -> None:
    """Processes and namespaces end a moment after they were told to."""
    end = time.monotonic() + LEAVE_SECONDS
    while (left := found()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left, "\n".join(left)
