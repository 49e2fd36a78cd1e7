"""Everything together: gateways, schedulers, workers that come, fail, slow down and leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sfllm.messages import Admitted, Grant, WorkerFinished
from sfllm.sockets import RECONNECT_SECONDS
from sfllm_cli.simulate.agenda import Agenda
from sfllm_cli.simulate.figures import Collector, Figures, WorkerCounts
from sfllm_cli.simulate.gateways import Ask, Gateways
from sfllm_cli.simulate.profiles import Profile
from sfllm_cli.simulate.scheduler import SimulatedScheduler
from sfllm_cli.simulate.schedulers import Outlets, Schedulers
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
    """What is simulated. `joining` workers come after the others, so many seconds apart.

    At `kill_scheduler_at` the first of several schedulers is killed; if `restart_scheduler_after` is given
    it runs again so many seconds later, and knows nothing.
    """

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
    schedulers: int = 1
    kill_scheduler_at: float | None = None
    restart_scheduler_after: float | None = None


class World:
    """A run. `clock` measures what the scheduler's core costs."""

    def __init__(self, setup: Setup, asked: Iterator[Asked], clock: Callable[[], float]) -> None:
        self.setup = setup
        self.agenda = Agenda()
        self.collector = Collector(setup.ttft_target, setup.itl_target)
        self.asked_count = 0
        self._asked = asked
        self._is_over = False
        self._gone: list[ModelledWorker] = []
        self._runs = 0
        self._slots: dict[int, ModelledWorker] = {}
        self._by_peer: dict[bytes, ModelledWorker] = {}
        self._schedulers = Schedulers(
            self.agenda,
            setup.policy,
            setup.schedulers,
            setup.link_seconds,
            Outlets(self._to_gateway, self._to_worker, self._on_record),
            clock,
        )
        self.gateways = Gateways(
            self.agenda, setup.gateways, self._schedulers, setup.max_tokens, self._on_end, self._on_move
        )

    @property
    def schedulers(self) -> list[SimulatedScheduler]:
        """The process at each address, the last one where it was restarted."""
        return self._schedulers.all

    @property
    def core_seconds(self) -> float:
        """What the cores of all schedulers took, in seconds of `clock`."""
        return self._schedulers.cpu_seconds

    @property
    def workers(self) -> list[ModelledWorker]:
        """Those that have come and are not known to be gone."""
        return list(self._by_peer.values())

    def run(self) -> Figures:
        """Let everything happen until the last request has ended."""
        agenda, setup = self.agenda, self.setup
        self._schedulers.start()
        for index in range(setup.schedulers):
            self.gateways.hello(index)
        for number in range(setup.workers):
            agenda.at(number * JOIN_SPREAD_SECONDS / setup.workers, self._join, number)
        for number in range(setup.joining):
            agenda.at((number + 1) * setup.joining_seconds, self._join, setup.workers + number)
        self._beat()
        for fault in setup.faults:
            agenda.at(fault.at, self._break, fault)
        if setup.kill_scheduler_at is not None:
            agenda.at(setup.kill_scheduler_at, self._kill_scheduler, 0)
        agenda.after(1.0, self._next)
        agenda.run(float("inf"), lambda: self._is_over and self.collector.count == self.asked_count)
        engines = [worker.engine for worker in (*self._gone, *self._by_peer.values())]
        counts = WorkerCounts(
            preemptions=sum(engine.preempted for engine in engines),
            queried_tokens=sum(engine.queried_tokens for engine in engines),
            hit_tokens=sum(engine.hit_tokens for engine in engines),
        )
        return self.collector.figures(counts, self.gateways.interrupted, self._schedulers.most_overtaken)

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
        self.gateways.beat()
        self.agenda.after(self.setup.policy.beat_seconds, self._beat)

    def _join(self, number: int) -> None:
        self._runs += 1
        peer = b"w%d-%d" % (number, self._runs)
        worker = ModelledWorker(
            self.agenda,
            peer,
            self.setup.profile,
            self._schedulers,
            self.gateways,
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
        worker = self._by_peer.pop(peer)
        self._gone.append(worker)
        self._schedulers.post(worker.scheduler, WorkerUnreachable(peer))

    def _kill_scheduler(self, index: int) -> None:
        """What was on its way to it is lost with it; its peers know after a while."""
        belonging = [worker for worker in self.workers if worker.alive and worker.scheduler == index]
        for worker in belonging:
            worker.cut_off()
        for event in self._schedulers.kill(index):
            if isinstance(event, FromWorker) and isinstance(event.message, WorkerFinished):
                ended = event.message.finished
                self.gateways.lost(int(event.message.gateway), ended.handle, ended.attempt, 1)
        for worker in belonging:
            self.agenda.after(RECONNECT_SECONDS, worker.notice)
        self.agenda.after(RECONNECT_SECONDS, self.gateways.lose, index)
        if self.setup.restart_scheduler_after is not None:
            self.agenda.after(self.setup.restart_scheduler_after, self._restart_scheduler, index)

    def _restart_scheduler(self, index: int) -> None:
        self._schedulers.restart(index)
        self.gateways.hello(index)
        for worker in self.workers:
            worker.came_back(index)

    def _to_worker(self, scheduler: int, action: ToWorker) -> None:
        if isinstance(action.message, Grant):
            for request in action.message.requests:
                if request.attempt == 0:
                    ask = self.gateways.open[int(request.gateway)].get(request.handle)
                    if ask is not None:
                        self._schedulers.overtakes[scheduler].granted(ask.asked.tenant, request.handle)
        worker = self._by_peer.get(action.peer)
        if worker is not None:
            self.agenda.after(
                self.setup.link_seconds, worker.receive, scheduler, action.message, action.arrays
            )

    def _to_gateway(self, scheduler: int, action: ToGateway) -> None:
        message = action.message
        if isinstance(message, Admitted) and message.attempt == 0:
            ask = self.gateways.open[int(action.peer)].get(message.handle)
            if ask is not None and ask.attempt == 0:
                self._schedulers.overtakes[scheduler].came(ask.asked.tenant, message.handle)
        self.gateways.receive(scheduler, action.peer, message)

    def _on_end(self, ask: Ask) -> None:
        self._on_move(ask)
        self.collector.end(ask)

    def _on_move(self, ask: Ask) -> None:
        self._schedulers.overtakes[ask.place].left(ask.asked.tenant, ask.handle)

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
