"""Everything together: gateways, one scheduler, workers that come, fail, slow down and leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sfllm.messages import Admitted, Grant, Message
from sfllm.wire import Array
from sfllm_cli.simulate.agenda import Agenda
from sfllm_cli.simulate.figures import Collector, Figures, WorkerCounts
from sfllm_cli.simulate.gateways import Ask, Gateways
from sfllm_cli.simulate.overtakes import Overtakes
from sfllm_cli.simulate.profiles import Profile
from sfllm_cli.simulate.scheduler import EPOCH, SimulatedScheduler
from sfllm_cli.simulate.worker import ModelledWorker
from sfllm_cli.simulate.workload import Asked
from sfllm_scheduler.core.events import FromWorker, Record, ToGateway, ToWorker, WorkerUnreachable
from sfllm_scheduler.core.state import PolicyValues

NOTICED_SECONDS = 0.8
"""After so long without heartbeats a dead worker is known to be gone."""

JOIN_SPREAD_SECONDS = 0.001
REPLACED_SECONDS = 5.0


class Fault(NamedTuple):
    """At a time something happens to the worker of that number: `fail`, `drain` or `slow` (by `factor`).

    A worker that failed or left is replaced after some seconds.
    """

    at: float
    kind: str
    worker: int
    factor: float = 1.0


class Setup(NamedTuple):
    """What is simulated. `joining` workers come after the others, so many seconds apart."""

    policy: PolicyValues
    profile: Profile
    workers: int
    gateways: int = 2
    link_seconds: float = 0.0003
    max_tokens: int | None = None
    ttft_target: float = 2.0
    itl_target: float = 0.05
    faults: tuple[Fault, ...] = ()
    joining: int = 0
    joining_seconds: float = 10.0


class World:
    """A run. `clock` measures what the scheduler's core costs."""

    def __init__(self, setup: Setup, asked: Iterator[Asked], clock: Callable[[], float]) -> None:
        self.setup = setup
        self.agenda = Agenda()
        self.collector = Collector(setup.ttft_target, setup.itl_target)
        self.asked_count = 0
        self._asked = asked
        self._is_over = False
        self._overtakes = Overtakes()
        self._gone: list[ModelledWorker] = []
        self._runs = 0
        self._slots: dict[int, ModelledWorker] = {}
        self._by_peer: dict[bytes, ModelledWorker] = {}
        self.scheduler = SimulatedScheduler(
            self.agenda,
            setup.policy,
            setup.link_seconds,
            self._to_gateway,
            self._to_worker,
            self._on_record,
            clock,
        )
        self.gateways = Gateways(
            self.agenda,
            setup.gateways,
            setup.link_seconds,
            setup.max_tokens,
            self.scheduler.post,
            self._on_end,
        )

    @property
    def workers(self) -> list[ModelledWorker]:
        """Those that have come and are not known to be gone."""
        return list(self._by_peer.values())

    def run(self) -> Figures:
        """Let everything happen until the last request has ended."""
        agenda, setup = self.agenda, self.setup
        self.scheduler.start()
        self.gateways.start(EPOCH)
        for number in range(setup.workers):
            agenda.at(number * JOIN_SPREAD_SECONDS / setup.workers, self._join, number)
        for number in range(setup.joining):
            agenda.at((number + 1) * setup.joining_seconds, self._join, setup.workers + number)
        self._beat()
        for fault in setup.faults:
            agenda.at(fault.at, self._break, fault)
        agenda.after(1.0, self._next)
        agenda.run(float("inf"), lambda: self._is_over and self.collector.count == self.asked_count)
        engines = [worker.engine for worker in (*self._gone, *self._by_peer.values())]
        counts = WorkerCounts(
            preemptions=sum(engine.preempted for engine in engines),
            queried_tokens=sum(engine.queried_tokens for engine in engines),
            hit_tokens=sum(engine.hit_tokens for engine in engines),
        )
        return self.collector.figures(counts, self.gateways.interrupted, self._overtakes.most)

    def _next(self, asked: Asked | None = None) -> None:
        """A client asks, and it becomes known when the next one does."""
        if asked is not None:
            self.asked_count += 1
            self.collector.came(asked)
            self.gateways.ask(asked)
        following = next(self._asked, None)
        if following is None:
            self._is_over = True
            self.collector.all_came()
        else:  # the first second belongs to workers that join
            self.agenda.at(following.at + 1.0, self._next, following._replace(at=following.at + 1.0))

    def _beat(self) -> None:
        self.gateways.beat(EPOCH, self.scheduler.digest_of_gateway)
        self.agenda.after(self.setup.policy.beat_seconds, self._beat)

    def _join(self, number: int) -> None:
        self._runs += 1
        peer = b"w%d-%d" % (number, self._runs)
        worker = ModelledWorker(
            self.agenda,
            peer,
            self.setup.profile,
            self._from_worker,
            self.gateways,
            self.scheduler.digest_of_worker,
            self.collector.step,
        )
        self._slots[number] = self._by_peer[peer] = worker
        worker.start()

    def _break(self, fault: Fault) -> None:
        worker = self._slots.get(fault.worker)
        if worker is None or not worker.alive:
            return
        match fault.kind:
            case "slow":
                worker.slow_down(fault.factor)
            case "drain":
                worker.drain()
                self.agenda.after(REPLACED_SECONDS, self._join, fault.worker)
            case _:
                worker.die()
                self.agenda.after(NOTICED_SECONDS, self._notice, worker.peer)
                self.agenda.after(REPLACED_SECONDS, self._join, fault.worker)

    def _notice(self, peer: bytes) -> None:
        self._gone.append(self._by_peer.pop(peer))
        self.scheduler.post(WorkerUnreachable(peer))

    def _from_worker(self, peer: bytes, message: Message, arrays: tuple[Array, ...]) -> None:
        self.scheduler.post(FromWorker(peer, message, arrays))

    def _to_worker(self, action: ToWorker) -> None:
        if isinstance(action.message, Grant):
            for request in action.message.requests:
                if request.attempt == 0:
                    ask = self.gateways.open[int(request.gateway)][request.handle]
                    self._overtakes.granted(ask.asked.tenant, request.handle)
        worker = self._by_peer.get(action.peer)
        if worker is not None:
            self.agenda.after(self.setup.link_seconds, worker.receive, action.message, action.arrays)

    def _to_gateway(self, action: ToGateway) -> None:
        message = action.message
        if isinstance(message, Admitted) and message.attempt == 0:
            ask = self.gateways.open[int(action.peer)][message.handle]
            self._overtakes.came(ask.asked.tenant, message.handle)
        self.gateways.receive(action.peer, message)

    def _on_end(self, ask: Ask) -> None:
        self._overtakes.left(ask.asked.tenant, ask.handle)
        self.collector.end(ask)

    def _on_record(self, record: Record) -> None:
        if record.event == "granted":
            spread = record.fields["spread"]
            assert isinstance(spread, float)
            self.collector.cohort(spread)


def spread_faults(
    kinds: Sequence[tuple[str, float]], workers: int, seconds: float, chance: Callable[[], float]
) -> tuple[Fault, ...]:
    """Faults of each kind, `share` of the workers each, at random times within `seconds`."""
    faults: list[Fault] = []
    for kind, share in kinds:
        order = sorted(range(workers), key=lambda _: chance())
        chosen = order[: round(share * workers)]
        faults += [Fault(1.0 + chance() * seconds, kind, number, factor=4.0) for number in chosen]
    return tuple(sorted(faults))
