"""Which processes a fleet has, on which ports, with what command lines: from options to a list, no more."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from chaos.http_client import Address
from sfllm.config import Settings, to_arguments
from sfllm.settings import CommonSettings, GatewaySettings, SchedulerSettings, WorkerSettings
from sfllm_cli.child import ChildSpec
from sfllm_cli.serve_plan import child_environment

Engine = Literal["mock", "tiny", "smollm2"]
Kind = Literal["scheduler", "gateway", "worker"]

LOOPBACK = "127.0.0.1"
NONE: Mapping[str, Any] = {}

_TINY = {
    "model": "tiny-llama",
    "load_format": "dummy",
    "max_context_length": 2048,
    "max_running_tokens": 16384,
}
ENGINES: Mapping[Engine, Mapping[str, Any]] = {
    "mock": {"mock": True},
    "tiny": {**_TINY, "dtype": "float32", "threads": 1, "device": "cpu"},
    "smollm2": {
        "model": "smollm2",
        "load_format": "auto",
        "generation_defaults": False,
        "dtype": "float32",
        "threads": 1,
        "device": "cpu",
        "max_running_tokens": 16384,
    },
}
MODULES: Mapping[Kind, tuple[str, type[Settings]]] = {
    "scheduler": ("sfllm_scheduler", SchedulerSettings),
    "gateway": ("sfllm_gateway", GatewaySettings),
    "worker": ("sfllm_worker", WorkerSettings),
}


class FleetOptions(NamedTuple):
    """How large a fleet is, and settings of its services that differ from their own defaults.

    `shared_port`: all gateways listen on one port. `relays`: the links to the scheduler can be broken.
    """

    engine: Engine = "mock"
    workers: int = 1
    gateways: int = 1
    schedulers: int = 1
    beat_seconds: float = 0.5
    lease_seconds: float = 2.0
    shared_port: bool = False
    relays: bool = True
    worker: Mapping[str, Any] = NONE
    gateway: Mapping[str, Any] = NONE
    scheduler: Mapping[str, Any] = NONE


class Way(NamedTuple):
    """A relay's port and where it leads."""

    port: int
    target: Address


class Placed(NamedTuple):
    """One process: how to run it, where its admin port is, and for a gateway where its API is."""

    kind: Kind
    spec: ChildSpec
    admin: Address
    url: Address | None
    ways: tuple[Way, ...]


def ports_needed(options: FleetOptions) -> int:
    """How many ports `place` takes."""
    others = options.gateways + options.workers
    ways = 2 * options.schedulers * others if options.relays else 0
    return 1 + 4 * options.schedulers + 2 * options.gateways + options.workers + ways


def place(options: FleetOptions, ports: Iterator[int]) -> list[Placed]:
    """The processes in the order of their start."""
    names = ("gateway_address", "worker_address", "asset_address")
    meetings = {name: [next(ports) for _ in range(options.schedulers)] for name in names}
    shared = next(ports)
    beats = {"beat_seconds": options.beat_seconds, "lease_seconds": options.lease_seconds}
    placed = []
    for index in range(options.schedulers):
        bound = {name: _tcp(found[index]) for name, found in meetings.items()}
        scheduler = msgspec.convert({**bound, **beats, **options.scheduler}, SchedulerSettings)
        name = "scheduler" if options.schedulers == 1 else f"scheduler-{index}"
        placed.append(_placed("scheduler", name, scheduler, next(ports), ()))
    for index in range(options.gateways):
        addresses, ways = _ways(("gateway_address", "asset_address"), meetings, ports, options.relays)
        port = next(ports)
        values = {"port": shared if options.shared_port else port, **addresses, **options.gateway}
        gateway = msgspec.convert(values, GatewaySettings)
        placed.append(_placed("gateway", f"gateway-{index}", gateway, next(ports), ways))
    for index in range(options.workers):
        addresses, ways = _ways(("worker_address", "asset_address"), meetings, ports, options.relays)
        worker = msgspec.convert({**addresses, **ENGINES[options.engine], **options.worker}, WorkerSettings)
        placed.append(_placed("worker", f"worker-{index}", worker, next(ports), ways))
    return placed


def _ways(
    names: tuple[str, ...], meetings: Mapping[str, Sequence[int]], ports: Iterator[int], relays: bool
) -> tuple[dict[str, tuple[str, ...]], tuple[Way, ...]]:
    """The addresses that a process is told, and the relays that listen there."""
    if not relays:
        return {name: tuple(map(_tcp, meetings[name])) for name in names}, ()
    ways = {
        name: [Way(next(ports), Address(LOOPBACK, target)) for target in meetings[name]] for name in names
    }
    addresses = {name: tuple(_tcp(way.port) for way in found) for name, found in ways.items()}
    return addresses, tuple(way for found in ways.values() for way in found)


def _placed(kind: Kind, name: str, settings: CommonSettings, admin: int, ways: tuple[Way, ...]) -> Placed:
    module, cls = MODULES[kind]
    arguments = to_arguments(msgspec.structs.replace(settings, admin_port=admin), cls)
    spec = ChildSpec(
        name,
        (sys.executable, "-m", module, *arguments),
        environment={**child_environment(os.environ), "OMP_NUM_THREADS": "1"},
    )
    url = Address(LOOPBACK, settings.port) if isinstance(settings, GatewaySettings) else None
    return Placed(kind, spec, Address(LOOPBACK, admin), url, ways)


def _tcp(port: int) -> str:
    return f"tcp://{LOOPBACK}:{port}"
