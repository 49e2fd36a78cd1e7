"""Which processes `sfllm serve` runs and with what command lines: from settings to a list, no more."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from sfllm.config import ENV_PREFIX, Settings, to_arguments, to_variables
from sfllm.settings import CommonSettings, GatewaySettings, SchedulerSettings, WorkerSettings
from sfllm_cli.child import ChildSpec
from sfllm_cli.gpus import count_workers, gpu_of
from sfllm_cli.settings import ADDRESSES, ServeSettings, ServicesSettings

_INHERITED = frozenset({"SFLLM_CACHE_DIR", "SFLLM_MATRIX_TILES", "SFLLM_UNPACKED_WEIGHTS"})
"""Variables that are no setting of a service."""

GATEWAYS_STOP, WORKERS_STOP, SCHEDULER_STOPS = range(3)
"""Streams end first, then what makes their tokens, then what connects the two."""


def child_specs(
    settings: ServicesSettings,
    sockets: Path,
    environ: Mapping[str, str],
    cores: int,
    gpus: Sequence[str] = (),
) -> list[ChildSpec]:
    """The processes in the order of their start. `sockets` is a private directory for their socket files.

    `gpus` are those that workers may use, see `find_gpus`.
    """
    serve = settings.serve
    workers = count_workers(serve.workers, gpus)
    addresses = _addresses(serve, sockets)
    environment = child_environment(environ)
    gateway = msgspec.structs.replace(
        settings.gateway, **{name: addresses[name] for name in ("gateway_address", "asset_address")}
    )
    worker = msgspec.structs.replace(
        settings.worker,
        threads=settings.worker.threads or _threads_each(workers, cores),
        **{name: addresses[name] for name in ("worker_address", "asset_address")},
    )
    worker_environment = _thread_environment(worker)
    given_gpus = () if worker.gpu_claims else gpus  # workers that claim GPUs find their own
    services: list[tuple[str, str, CommonSettings, type[Settings], int, dict[str, str]]] = [
        *(
            (name, "sfllm_scheduler", scheduler, SchedulerSettings, SCHEDULER_STOPS, {})
            for name, scheduler in _schedulers(settings, addresses)
        ),
        *(
            (f"gateway-{index}", "sfllm_gateway", gateway, GatewaySettings, GATEWAYS_STOP, {})
            for index in range(serve.gateways)
        ),
        *(
            (
                *(f"worker-{index}", "sfllm_worker", worker, WorkerSettings, WORKERS_STOP),
                worker_environment | gpu_of(index, workers, given_gpus),
            )
            for index in range(workers)
        ),
    ]
    ports = admin_ports(serve, gpus) or [0] * len(services)
    return [
        ChildSpec(
            name,
            (
                *(sys.executable, "-m", module),
                *to_arguments(msgspec.structs.replace(of_process, admin_port=port), cls),
            ),
            stop_rank,
            environment | extra | to_variables(of_process, cls),
        )
        for (name, module, of_process, cls, stop_rank, extra), port in zip(services, ports, strict=True)
    ]


def _addresses(serve: ServeSettings, sockets: Path) -> dict[str, tuple[str, ...]]:
    """Where the processes meet: of each kind of address one for each scheduler."""
    ends = [""] if serve.schedulers == 1 else [f"-{index}" for index in range(serve.schedulers)]
    return {
        name: getattr(serve, name)
        or tuple(f"ipc://{sockets / name.removesuffix('_address')}{end}" for end in ends)
        for name in ADDRESSES
    }


def _schedulers(
    settings: ServicesSettings, addresses: Mapping[str, tuple[str, ...]]
) -> list[tuple[str, SchedulerSettings]]:
    """Each scheduler's name and settings; one that is alone needs no number."""
    count = settings.serve.schedulers
    record = settings.scheduler.record
    return [
        (
            "scheduler" if count == 1 else f"scheduler-{index}",
            msgspec.structs.replace(
                settings.scheduler,
                record=record if record is None or count == 1 else f"{record}-{index}",
                **{name: found[index] for name, found in addresses.items()},
            ),
        )
        for index in range(count)
    ]


def admin_ports(serve: ServeSettings, gpus: Sequence[str] = ()) -> list[int]:
    """One port a process, in the order of their start; none when they were not asked for."""
    count = serve.schedulers + serve.gateways + count_workers(serve.workers, gpus)
    return list(range(serve.admin_port, serve.admin_port + count)) if serve.admin_port else []


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for the services: without settings, which they get as flags but for secrets.

    A variable that stayed would win over a default, and so over a flag of `serve` whose
    value is the default. The model's files are here by now: a restart need not ask the hub.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith(ENV_PREFIX) or name in _INHERITED
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def local_url(host: str, port: int, scheme: str = "http") -> str:
    """The address at which this machine reaches a server that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{reachable}]:{port}" if ":" in reachable else f"{scheme}://{reachable}:{port}"


def _threads_each(workers: int, cores: int) -> int | None:
    """CPU threads of each of several workers, which would otherwise all use every core."""
    return max(1, cores // workers) if workers > 1 else None


def _thread_environment(worker: WorkerSettings) -> dict[str, str]:
    return {} if worker.threads is None else {"OMP_NUM_THREADS": str(worker.threads)}
