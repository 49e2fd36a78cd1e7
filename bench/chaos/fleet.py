"""A whole sfllm of real processes, each reachable for faults: signals, and its own ways to the scheduler."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType

from chaos.http_client import Address, get
from chaos.layout import FleetOptions, place, ports_needed
from chaos.metrics import read, total
from chaos.ports import free_ports
from chaos.relay import Relay
from chaos.service import Service

POLL_SECONDS = 0.05
READY_SECONDS = 120.0
STOP_SECONDS = 60.0

HELD: Mapping[str, tuple[tuple[str, Mapping[str, str]], ...]] = {
    "scheduler": (("num_requests_running", {}), ("num_requests_waiting", {}), ("requests_on_trial", {})),
    "gateway": (("gateway_open_requests", {}),),
    "worker": (
        ("kv_blocks", {"state": "used"}),
        ("worker_sequences", {"state": "running"}),
        ("worker_sequences", {"state": "waiting"}),
    ),
}
"""What each kind of service must hold nothing of when no request is open."""


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float) -> bool:
    """Ask until it is so; False when that takes longer."""
    end = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(POLL_SECONDS)
    return True


class Fleet:
    """Owns processes, relays and log files within `async with`, which begins when all are ready."""

    def __init__(self, options: FleetOptions, logs: Path) -> None:
        self.options = options
        self.logs = logs
        self.services: list[Service] = []
        self.urls: dict[str, Address] = {}
        self._ports: list[tuple[Relay, int]] = []
        logs.mkdir(parents=True, exist_ok=True)
        for placed in place(options, iter(free_ports(ports_needed(options)))):
            relays = tuple(Relay(way.target) for way in placed.ways)
            self._ports += [(relay, way.port) for relay, way in zip(relays, placed.ways, strict=True)]
            log = logs / f"{placed.spec.name}.log"
            service = Service(placed.spec, placed.kind, placed.admin, log, relays)
            self.services.append(service)
            if placed.url is not None:
                self.urls[service.name] = placed.url

    def of_kind(self, kind: str) -> list[Service]:
        """The services of a kind, in order."""
        return [service for service in self.services if service.kind == kind]

    @property
    def scheduler(self) -> Service:
        """The first scheduler, or the only one."""
        return self.services[0]

    def service(self, name: str) -> Service:
        """The service of that name."""
        return next(service for service in self.services if service.name == name)

    async def __aenter__(self) -> Fleet:
        try:
            for relay, port in self._ports:
                await relay.start(port)
            for service in self.services:
                service.start()
            await self.wait_ready()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        """Until every gateway can serve and every worker is there. Raises TimeoutError with the reason."""
        missing = "all"

        async def is_ready() -> bool:
            nonlocal missing
            missing = await self._missing()
            return not missing

        if not await eventually(is_ready, seconds):
            raise TimeoutError(f"not ready in {seconds:.0f} s: {missing}; logs in {self.logs}")

    async def value(self, service: Service, name: str, **labels: str) -> float | None:
        """A metric summed over its labels, None while the service does not answer."""
        try:
            return total(await read(service.admin), f"sfllm:{name}", **labels)
        except (OSError, TimeoutError):
            return None

    async def wait_value(
        self,
        service: Service,
        name: str,
        wanted: Callable[[float], bool],
        seconds: float = READY_SECONDS,
        **labels: str,
    ) -> None:
        """Until a metric is as wanted. Raises TimeoutError with the last value seen."""
        seen: float | None = None

        async def is_as_wanted() -> bool:
            nonlocal seen
            seen = await self.value(service, name, **labels)
            return seen is not None and wanted(seen)

        if not await eventually(is_as_wanted, seconds):
            raise TimeoutError(f"{service.name}: {name} stayed at {seen} for {seconds:.0f} s")

    async def leaks(self, seconds: float = 30.0) -> dict[str, float]:
        """What is still held although no request is open, after at most `seconds` of patience."""
        found: dict[str, float] = {}

        async def holds_nothing() -> bool:
            nonlocal found
            found = await self._held()
            return not found

        if await eventually(holds_nothing, seconds):
            return await self._disagreements()
        return found

    async def stop(self) -> dict[str, int | None]:
        """SIGTERM to all, streams first; exit codes, None for one that had to be killed."""
        codes: dict[str, int | None] = {}
        for kind in ("gateway", "worker", "scheduler"):
            group = self.of_kind(kind)
            found = await asyncio.gather(*(service.stop(STOP_SECONDS) for service in group))
            codes |= {service.name: code for service, code in zip(group, found, strict=True)}
        return codes

    async def _missing(self) -> str:
        """What is not ready yet, empty when all is. Raises RuntimeError when a process cannot be kept up."""
        if failures := [service.failure for service in self.services if service.failure]:
            raise RuntimeError(f"{'; '.join(failures)}; logs in {self.logs}")
        for name, address in self.urls.items():
            try:
                status, body = await get(address, "/ready")
            except (OSError, TimeoutError) as error:
                return f"{name} ({error})"
            if status != 200:
                return f"{name} ({body.decode(errors='replace')[:200]})"
        for service in self.services:  # behind a shared port only this names the process that answers
            if not await service.answers("/ready"):
                return service.name
        serving = [
            await self.value(scheduler, "workers", state="serving") for scheduler in self.of_kind("scheduler")
        ]
        found = sum(count or 0 for count in serving)
        return "" if found == self.options.workers else f"workers (serving: {serving})"

    async def _held(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for service in self.services:
            for name, labels in HELD[service.kind]:
                value = await self.value(service, name, **labels)
                if value != 0:
                    found[" ".join([service.name, name, *labels.values()])] = -1.0 if value is None else value
        return found

    async def _disagreements(self) -> dict[str, float]:
        """How often, within a few beats, two sides of a link found that they believe different things."""
        name, schedulers = "reconciliations_total", self.of_kind("scheduler")
        before = [await self.value(scheduler, name) for scheduler in schedulers]
        await asyncio.sleep(3 * self.options.beat_seconds)
        after = [await self.value(scheduler, name) for scheduler in schedulers]
        return {
            f"{scheduler.name} {name} at rest": (now or 0.0) - (then or 0.0)
            for scheduler, then, now in zip(schedulers, before, after, strict=True)
            if now != then
        }

    async def _close(self) -> None:
        await asyncio.gather(
            *(service.close() for service in self.services), *(relay.close() for relay, _ in self._ports)
        )
