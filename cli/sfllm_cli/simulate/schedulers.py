"""Several schedulers behind one list of addresses, one of which may be killed and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sfllm_cli.simulate.agenda import Agenda
from sfllm_cli.simulate.overtakes import Overtakes
from sfllm_cli.simulate.scheduler import SimulatedScheduler
from sfllm_scheduler.core.events import Event, Record, ToGateway, ToWorker
from sfllm_scheduler.core.state import PolicyValues

FIRST_EPOCH = 1


class Outlets(NamedTuple):
    """Where the actions of a scheduler go; the first argument is its number."""

    to_gateway: Callable[[int, ToGateway], None]
    to_worker: Callable[[int, ToWorker], None]
    on_record: Callable[[Record], None]


class Schedulers:
    """The processes that run or ran, named by their places in `addresses`.

    `overtakes` are counted for each: they have a queue each, and no order between them. `clock` measures
    the CPU seconds that the cores take.
    """

    def __init__(
        self,
        agenda: Agenda,
        policy: PolicyValues,
        count: int,
        link_seconds: float,
        outlets: Outlets,
        clock: Callable[[], float],
    ) -> None:
        self.link_seconds = link_seconds
        self.addresses = tuple(f"scheduler-{index}" for index in range(count))
        self.overtakes = [Overtakes() for _ in self.addresses]
        self._agenda = agenda
        self._policy = policy
        self._outlets = outlets
        self._clock = clock
        self._gone: list[SimulatedScheduler] = []
        self.all = [self._process(index, FIRST_EPOCH) for index in range(count)]

    @property
    def cpu_seconds(self) -> float:
        """What all cores took, also those that were killed."""
        return sum(each.cpu_seconds for each in (*self._gone, *self.all))

    @property
    def most_overtaken(self) -> int:
        """How often a request was passed at most by later ones of its tenant at the same scheduler."""
        return max(each.most for each in self.overtakes)

    def start(self) -> None:
        """All of them run from now on."""
        for each in self.all:
            each.start()

    def post(self, index: int, event: Event) -> None:
        """Something is on its way to a scheduler; to one that was killed it is lost."""
        self.all[index].post(event)

    def epoch_of(self, index: int) -> int | None:
        """The epoch of a scheduler that answers, None of one that was killed."""
        each = self.all[index]
        return each.epoch if each.alive else None

    def digest_of_gateway(self, index: int, peer: bytes) -> int:
        """What a scheduler thinks that a gateway holds."""
        return self.all[index].digest_of_gateway(peer)

    def digest_of_worker(self, index: int, peer: bytes) -> int:
        """What a scheduler thinks that a worker holds."""
        return self.all[index].digest_of_worker(peer)

    def kill(self, index: int) -> list[Event]:
        """End a process: what it held is forgotten. What was on its way to it."""
        self.overtakes[index].forget()
        return self.all[index].kill()

    def restart(self, index: int) -> None:
        """Another process serves the address of one that was killed."""
        gone = self.all[index]
        self._gone.append(gone)
        self.all[index] = self._process(index, gone.epoch + 1)
        self.all[index].start()

    def _process(self, index: int, epoch: int) -> SimulatedScheduler:
        return SimulatedScheduler(
            self._agenda,
            self._policy,
            epoch,
            self.link_seconds,
            lambda action: self._outlets.to_gateway(index, action),
            lambda action: self._outlets.to_worker(index, action),
            self._outlets.on_record,
            self._clock,
        )
