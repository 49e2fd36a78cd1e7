"""A run: calm answers first, then many clients while faults happen, then peace and a look for leaks."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from chaos.ask import PAUSE_BEFORE_RETRY_SECONDS, Delivery, ask, ask_until_accepted
from chaos.fleet import Fleet, eventually
from chaos.judge import Excuse, judge
from chaos.plan import PlannedFault
from chaos.service import Service
from chaos.tally import Tally
from chaos.templates import Template, with_stop

CALM_AT_ONCE = 8
UP_SECONDS = 30.0
LEAVING_SHARE = 0.1
LEAVES_AFTER_SECONDS = 1.0
WATCH_SECONDS = 1.0


class Doubtful(NamedTuple):
    """A delivery that differs from the calm one, to be looked at when there is time."""

    calm: Delivery
    got: Delivery
    gateway_died: bool


class Run:
    """What happens to one fleet. `grace_seconds` bounds how long a SIGTERM may take."""

    def __init__(
        self,
        fleet: Fleet,
        seed: int,
        *,
        logprob_tolerance: float = 0.0,
        excuse: Excuse | None = None,
        grace_seconds: float = 150.0,
    ) -> None:
        self.tally = Tally()
        self.faults: Counter[str] = Counter()
        self.problems: list[str] = []
        self.moves = 0
        self._fleet = fleet
        self._seed = seed
        self._tolerance = logprob_tolerance
        self._excuse = excuse
        self._grace_seconds = grace_seconds
        self._doubtful: list[Doubtful] = []
        self._moves_seen: dict[str, float] = {}

    async def calm(self, templates: Sequence[Template]) -> list[Delivery]:
        """Each request's answer while nothing is broken, and that of variants with stop strings."""
        rng = random.Random(f"stops {self._seed}")
        room = asyncio.Semaphore(CALM_AT_ONCE)
        address = next(iter(self._fleet.urls.values()))

        async def one(template: Template) -> Delivery:
            async with room:
                delivery = await ask_until_accepted(address, template)
            if delivery.ended != "complete":
                raise RuntimeError(f"{template.name} failed in calm: {delivery.status} {delivery.error}")
            return delivery

        asked = await asyncio.gather(*map(one, templates))
        texts = [[choice.text for choice in each.choices.values()] for each in asked]
        stopped = [with_stop(rng, each.template, text) for each, text in zip(asked, texts, strict=True)]
        return [*asked, *await asyncio.gather(*(one(each) for each in stopped[::2] if each is not None))]

    async def storm(
        self, asked: Sequence[Delivery], plan: Sequence[PlannedFault], clients: int, seconds: float
    ) -> None:
        """Clients ask for `seconds` while the plan is carried out; returns when all have their answers."""
        started = time.monotonic()
        watch = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(clients):
                    group.create_task(self._client(number, asked, started + seconds))
                for fault in plan:
                    group.create_task(self._break(fault, started))
        finally:
            watch.cancel()
            for service in self._fleet.services:
                service.resume()
                for relay in service.relays:
                    relay.heal()
        await asyncio.to_thread(self._look_again)
        self.problems += [
            f"{service.name} ended by itself: exit code {end.code}"
            if not end.done
            else f"{service.name} was {end.done} and ended with exit code {end.code}"
            for service in self._fleet.services
            for end in service.ends
            if not end.was_expected
        ]

    # clients

    async def _client(self, number: int, asked: Sequence[Delivery], until: float) -> None:
        rng = random.Random(f"client {self._seed} {number}")
        while time.monotonic() < until:
            leave_after = None
            if rng.random() < LEAVING_SHARE:
                leave_after = rng.expovariate(1 / LEAVES_AFTER_SECONDS)
            await self._one(rng, rng.choice(asked), leave_after)

    async def _one(self, rng: random.Random, calm: Delivery, leave_after: float | None) -> None:
        """Ask until it is accepted."""
        while True:
            name, address = rng.choice(list(self._fleet.urls.items()))
            gateway = self._fleet.service(name)
            delivery = await ask(address, calm.template, leave_after)
            if delivery.ended == "broken" and not delivery.status and gateway.left_since(delivery.began):
                delivery.ended = "turned away"  # it was still in the queue of a listening socket that closed
            gateway_died = gateway.was_killed_since(delivery.began)
            fault = judge(calm, delivery, self._tolerance)
            if fault is not None and self._excuse is not None:
                self._doubtful.append(Doubtful(calm, delivery, gateway_died))
            else:
                self.tally.take(delivery, fault, gateway_died)
            if delivery.ended != "turned away":
                return
            await asyncio.sleep(PAUSE_BEFORE_RETRY_SECONDS)

    # faults

    async def _break(self, fault: PlannedFault, started: float) -> None:
        await asyncio.sleep(started + fault.at - time.monotonic())
        service = self._fleet.service(fault.target)
        # A second signal would end a drain at once, as it should.
        if service.is_leaving or not await self._is_up(service):
            self.faults["skipped"] += 1
            return
        self.faults[f"{fault.kind} {service.kind}"] += 1
        match fault.kind:
            case "kill":
                service.kill()
            case "restart":
                await self.restart(service)
            case "stop":
                service.pause()
                await asyncio.sleep(fault.seconds)
                service.resume()
            case _:
                await self._break_links(service, fault)

    async def restart(self, service: Service) -> None:
        """SIGTERM, and it is started again; a problem unless it ends with 0 in time."""
        lives = service.lives
        if service.terminate() and not await service.ended(lives, self._grace_seconds):
            self.problems.append(f"{service.name} did not end in {self._grace_seconds:.0f} s after SIGTERM")
            service.kill()

    async def _break_links(self, service: Service, fault: PlannedFault) -> None:
        for relay in service.relays:
            match fault.kind:
                case "hold":
                    relay.hold()
                case "cut":
                    relay.cut()
                case "delay":
                    relay.delay_seconds = fault.amount
                case "throttle":
                    relay.bytes_per_second = fault.amount
        await asyncio.sleep(fault.seconds)
        for relay in service.relays:
            relay.heal()

    async def _is_up(self, service: Service) -> bool:
        """Wait until a service that was just started takes signals as it should."""
        return await eventually(service.answers, UP_SECONDS)

    def _look_again(self) -> None:
        """Judge what was doubtful, by a model that takes its time."""
        for calm, got, gateway_died in self._doubtful:
            fault = judge(calm, got, self._tolerance, self._excuse)
            self.tally.near_ties += fault is None
            self.tally.take(got, fault, gateway_died)

    async def _watch(self) -> None:
        """Add up a counter of processes that lose it when they die."""
        while True:
            for gateway in self._fleet.of_kind("gateway"):
                value = await self._fleet.value(gateway, "request_migrations_total")
                if value is not None:
                    seen = self._moves_seen.get(gateway.name, 0.0)
                    self.moves += int(value - seen if value >= seen else value)
                    self._moves_seen[gateway.name] = value
            await asyncio.sleep(WATCH_SECONDS)
