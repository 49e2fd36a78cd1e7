"""sfllm on two hosts, by the files in deploy/compose: all but two of the workers on host a, those on host b.

Beside it runs a plain fleet without keys or compose, whose only worker is on host b and fast: it shows what
every request's answer is when nothing disturbs it, and what somebody on the network could read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from chaos.ask import Delivery
from chaos.fleet import eventually
from chaos.http_client import Address, BrokenConnectionError, get
from chaos.metrics import read, total
from compose_stack import Stack, until_down
from namespaces import CLIENT_SIDE_OF_FIRST_HOST
from two_hosts import ROOT, Host, TwoHosts

COMPOSE = ROOT / "deploy" / "compose"
GATEWAY = Address(CLIENT_SIDE_OF_FIRST_HOST, 8081)
PLAIN_GATEWAY = Address(CLIENT_SIDE_OF_FIRST_HOST, 8082)
SCHEDULER = Address(CLIENT_SIDE_OF_FIRST_HOST, 9090)
REMOTE_WORKERS = 2
USER = 10001
"""Whom the images run as."""
PATIENCE_SECONDS = 60.0
_METRICS = (
    "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:9090/metrics').read().decode())"
)


@dataclass(frozen=True)
class HostStacks:
    """The running stacks."""

    hosts: TwoHosts
    a: Stack
    b: Stack
    calm: dict[tuple[str, int], Delivery] = field(default_factory=dict)
    """What requests get when nothing disturbs them, by name and length, as far as it was asked for."""

    async def scheduler_value(self, name: str, **labels: str) -> float | None:
        """A metric of the scheduler, None while it does not answer."""
        try:
            return total(await read(SCHEDULER), f"sfllm:{name}", **labels)
        except (OSError, TimeoutError, BrokenConnectionError):
            return None

    async def until_serving(self, workers: int) -> None:
        """Wait until the scheduler has so many workers, and the gateway a scheduler."""

        async def all_there() -> bool:
            found = await self.scheduler_value("workers", state="serving")
            return found == workers and await is_ready(GATEWAY)

        assert await eventually(all_there, PATIENCE_SECONDS), "the workers are not there"

    def tokens_of_remote_workers(self) -> list[float]:
        """How many tokens each worker of host b has computed."""
        engine = self.hosts.b.engine
        pages = [engine.run("exec", name, "python3", "-c", _METRICS).stdout for name in self._remote()]
        return [total(page, "sfllm:iteration_tokens_total_sum") for page in pages]

    def remote_lives(self) -> list[str]:
        """When each worker of host b was started."""
        template = "{{.State.StartedAt}}"
        return [
            self.hosts.b.engine.run("inspect", "--format", template, name).stdout for name in self._remote()
        ]

    def restart_abruptly(self, *services: str) -> None:
        """Kill services of host a together, as a power cut does, and start them again."""
        names = [self.a.container(service) for service in services]
        self.hosts.a.engine.run("kill", *names)
        self.hosts.a.engine.run("start", *names)

    def _remote(self) -> list[str]:
        return self.b.compose("ps", "--quiet", "worker").split()


async def is_ready(gateway: Address) -> bool:
    """Whether a gateway could serve a request now."""
    try:
        return (await get(gateway, "/ready"))[0] == 200
    except (OSError, TimeoutError, BrokenConnectionError):
        return False


@contextmanager
def host_stacks(hosts: TwoHosts) -> Iterator[HostStacks]:
    """Everything up: a worker on host a, two on host b, and the plain fleet."""
    stacks = HostStacks(hosts, _scheduler_side(hosts.a), _worker_side(hosts))
    with ExitStack() as running:
        running.enter_context(until_down(stacks.a))
        stacks.a.compose("up", "--detach", "--no-build", "scheduler", "gateway", "worker")
        _carry_keys(stacks)
        running.enter_context(until_down(stacks.b))
        stacks.b.compose("up", "--detach", "--no-build", "--scale", f"worker={REMOTE_WORKERS}")
        _start_plain_fleet(hosts)
        yield stacks


def _carry_keys(stacks: HostStacks) -> None:
    """Have the first host make keys for the second, and carry the file there."""
    made, carried = stacks.hosts.a.directory / "host-b", stacks.hosts.b.directory / "links"
    made.mkdir(mode=0o700)
    own(made)
    volume = f"{made}:/keys/worker-host-b"
    stacks.a.compose("run", "--rm", "--no-deps", "--volume", volume, "keys", "--add", "worker", "host-b")
    shutil.copytree(made, carried)
    own(carried)


def own(folder: Path) -> None:
    """Give a folder and its files to the user of the images."""
    for path in (folder, *folder.iterdir()):
        os.chown(path, USER, USER)


def worker_addresses(scheduler: Host, base: int = 5558) -> tuple[str, str]:
    """The flags by which a worker finds the scheduler on a host, whose port for workers is `base`."""
    places = (f"tcp://{scheduler.address}:{port}" for port in (base, base + 1))
    return f"--worker-address={next(places)}", f"--asset-address={next(places)}"


def _scheduler_side(host: Host) -> Stack:
    mocks = {"services": {"scheduler": {"ports": [f"{SCHEDULER.host}:{SCHEDULER.port}:9090"]}, **_MOCKS}}
    files = (COMPOSE / "compose.yaml", COMPOSE / "compose.hosts.yaml", _written(host.directory, mocks))
    variables = {
        "SFLLM_BIND": GATEWAY.host,
        "SFLLM_PORT": str(GATEWAY.port),
        "SFLLM_LINKS_BIND": host.address,
    }
    return Stack(host.engine, _files(*files), variables)


def _worker_side(hosts: TwoHosts) -> Stack:
    files = (COMPOSE / "compose.workers.yaml", _written(hosts.b.directory, {"services": _MOCKS}))
    variables = {"SFLLM_SCHEDULER_HOST": hosts.a.address, "SFLLM_LINKS": str(hosts.b.directory / "links")}
    return Stack(hosts.b.engine, _files(*files), variables)


_MOCKS = {"worker": {"environment": {"SFLLM_MOCK": "1"}}}


def _written(directory: Path, overlay: object) -> Path:
    path = directory / "overlay.yaml"
    path.write_text(json.dumps(overlay))
    return path


def _files(*paths: Path) -> tuple[str, ...]:
    return tuple(part for path in paths for part in ("--file", str(path)))


def _start_plain_fleet(hosts: TwoHosts) -> None:
    a, b = hosts.a, hosts.b
    published = (f"{a.address}:6558:5558", f"{a.address}:6559:5559", f"{PLAIN_GATEWAY.host}:8082:8081")
    ports = [part for each in published for part in ("--publish", each)]
    insecure = ("--env", "SFLLM_INSECURE_LINKS=1")
    start = ("run", "--detach", "--init")
    a.engine.run(*start, "--name", "plain", *ports, *insecure, "sfllm-scheduler")
    local = ("--network", "container:plain", "--env", "SFLLM_ADMIN_PORT=9091")
    a.engine.run(*start, *local, *insecure, "--env", "SFLLM_ALLOW_ANONYMOUS=1", "sfllm-gateway")
    fast = ("--mock", "--mock-tokens-per-second=1000")
    b.engine.run(*start, *insecure, "sfllm-worker", *fast, *worker_addresses(a, 6558))
