"""Random histories of gateways, workers and requests, with losses, against the invariants of the core."""

from __future__ import annotations

from core_driver import finished
from fake_peers import SLOTS, FakeGateway, FakeRequest, FakeWorker
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from machine_peers import LOSSES, MAX_QUEUE, Peers
from msgspec.structs import replace

from sfllm.holdings import digest
from sfllm.messages import (
    ALL_CHOICES,
    Cancel,
    GatewayBeat,
    GatewayHello,
    Message,
    Resend,
    Sampling,
    Submit,
    WorkerBeat,
    WorkerBye,
    WorkerDraining,
    WorkerFault,
    WorkerFinished,
    WorkerProgress,
    WorkerReturned,
)
from sfllm.prefixes import prefix_names
from sfllm.wire import as_array
from sfllm_scheduler.core.events import (
    FromGateway,
    GatewayUnreachable,
    Tick,
    WorkerUnreachable,
)


class Machine(Peers, RuleBasedStateMachine):
    # who is there ---------------------------------------------------------------------

    @precondition(lambda self: len(self.gateways) < 3)
    @rule()
    def gateway_joins(self) -> None:
        self.names += 1
        peer = b"g-%d" % self.names
        self.gateways[peer] = FakeGateway(peer)
        self.send(FromGateway(peer, GatewayHello(1)))

    @precondition(lambda self: len(self.workers) < 3)
    @rule()
    def worker_joins(self) -> None:
        self.names += 1
        worker = FakeWorker(b"w-%d" % self.names)
        self.workers[worker.peer] = worker
        self.from_worker(worker, worker.hello)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), how=st.sampled_from(["bye", "failure", "unreachable", "again", "drain", "return"]))
    def worker_changes(self, data: st.DataObject, how: str) -> None:
        worker = self.workers[data.draw(st.sampled_from(sorted(self.workers)))]
        if how == "again":
            worker.draining = False
            self.from_worker(worker, worker.hello)
        elif how in ("drain", "return"):
            worker.draining = True
            self.from_worker(worker, WorkerDraining(worker.lease))
            for gateway, handle, attempt in sorted(worker.held) if how == "return" else ():
                del worker.held[gateway, handle, attempt]
                self.from_worker(worker, WorkerReturned(worker.lease, gateway, handle, attempt))
        else:
            if how == "unreachable":
                self.send(WorkerUnreachable(worker.peer))
            else:
                self.from_worker(worker, WorkerBye(worker.lease, "broken" if how == "failure" else ""))
            del self.workers[worker.peer]
            self.answers.pop(worker.peer, None)

    @precondition(lambda self: self.gateways)
    @rule(data=st.data(), again=st.booleans())
    def gateway_changes(self, data: st.DataObject, again: bool) -> None:
        peer = data.draw(st.sampled_from(sorted(self.gateways)))
        if again:
            self.send(FromGateway(peer, GatewayHello(1)))
            return
        self.send(GatewayUnreachable(peer))
        del self.gateways[peer]
        self.answers.pop(peer, None)

    @rule(kind=st.sampled_from(LOSSES))
    def something_will_be_lost(self, kind: type[Message]) -> None:
        self.to_lose.append(kind)

    # requests -------------------------------------------------------------------------

    @precondition(lambda self: self.gateways)
    @rule(
        data=st.data(),
        tokens=st.sampled_from([10, 12, 60, 200, 400]) | st.integers(1, 520),
        choices=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, 0, 1]),
        seconds=st.sampled_from([0.5, 5.0, 60.0]),
        times=st.integers(1, 5),
    )
    def submits(
        self, data: st.DataObject, tokens: int, choices: int, priority: int, seconds: float, times: int
    ) -> None:
        peer = data.draw(st.sampled_from(sorted(self.gateways)))
        for _ in range(times):
            self.names += 1
            submit = Submit(
                request_id=f"r{self.names}",
                handle=self.names,
                attempt=0,
                model="m",
                choices=tuple(range(choices)),
                generated_counts=(0,) * choices,
                sampling=Sampling(max_tokens=20, seed=1),
                priority=priority,
                milliseconds_left=int(seconds * 1000),
            )
            self.gateways[peer].requests[self.names] = FakeRequest(submit, tokens)
            self.send_submit(peer, self.names)

    def send_submit(self, peer: bytes, handle: int) -> None:
        request = self.gateways[peer].requests[handle]
        prompt = as_array("I", range(request.tokens))
        arrays = (prompt, as_array("I", ()), prefix_names(prompt, ""))
        self.send(FromGateway(peer, request.submit, arrays))

    def some_request(self, data: st.DataObject) -> tuple[bytes, int] | None:
        keys = [(peer, handle) for peer in sorted(self.gateways) for handle in self.gateways[peer].requests]
        return data.draw(st.sampled_from(keys)) if keys else None

    @rule(data=st.data(), newer=st.booleans(), suspects=st.sampled_from([0, 0, 1, 2, 3, 4, 4]))
    def submits_again(self, data: st.DataObject, newer: bool, suspects: int) -> None:
        key = self.some_request(data)
        if key is None or self.gateways[key[0]].requests[key[1]].ended:
            return
        request = self.gateways[key[0]].requests[key[1]]
        if newer and not request.finished and not request.cancelled:
            request.waits = request.over = False
            attempt = request.submit.attempt + 1
            request.submit = replace(request.submit, attempt=attempt, suspects=suspects)
        elif request.over or request.finished or request.cancelled:
            return
        self.send_submit(*key)

    @rule(data=st.data(), one=st.booleans())
    def cancels(self, data: st.DataObject, one: bool) -> None:
        key = self.some_request(data)
        if key is None:
            return
        request = self.gateways[key[0]].requests[key[1]]
        choice = 0 if one else ALL_CHOICES
        request.cancelled.update([0] if one else request.submit.choices)
        self.send(FromGateway(key[0], Cancel(key[1], request.submit.attempt, choice, "test")))

    @rule(data=st.data())
    def asks_for_tokens_again(self, data: st.DataObject) -> None:
        key = self.some_request(data)
        if key is not None:
            request = self.gateways[key[0]].requests[key[1]]
            if request.left:
                self.send(FromGateway(key[0], Resend(key[1], request.submit.attempt, request.left[0], 3)))

    @rule(data=st.data(), fault=st.booleans())
    def worker_ends_one(self, data: st.DataObject, fault: bool) -> None:
        busy = sorted(peer for peer, worker in self.workers.items() if worker.held)
        if not busy:
            return
        worker = self.workers[data.draw(st.sampled_from(busy))]
        key = data.draw(st.sampled_from(sorted(worker.held)))
        if fault:
            del worker.held[key]
            self.from_worker(worker, WorkerFault(worker.lease, *key, "engine_failure", "x"))
        else:
            self.finish(worker, key, min(worker.held[key][1]))

    def finish(self, worker: FakeWorker, key: tuple[bytes, int, int], choice: int) -> None:
        entry, _ = worker.held[key]
        worker.finish(key, choice)
        self.from_worker(worker, WorkerFinished(worker.lease, entry.gateway, finished(entry, choice)))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), pending=st.integers(0, 600))
    def worker_takes_in_prompts(self, data: st.DataObject, pending: int) -> None:
        worker = self.workers[data.draw(st.sampled_from(sorted(self.workers)))]
        self.from_worker(worker, WorkerProgress(worker.lease, worker.grants, pending))

    @precondition(lambda self: self.recalled)
    @rule(begun=st.booleans())
    def worker_hears_a_recall(self, begun: bool) -> None:
        peer, key = self.recalled.pop(0)
        worker = self.workers.get(peer)
        if worker is not None and key in worker.held and not begun:
            del worker.held[key]
            self.from_worker(worker, WorkerReturned(worker.lease, *key))

    @precondition(lambda self: self.workers)
    @rule(count=st.integers(1, 4), turns=st.integers(1, 4))
    def workers_go_on(self, count: int, turns: int) -> None:
        """Some turns in which workers finish a few requests each and get others."""
        for _ in range(turns):
            for worker in list(self.workers.values()):
                for key in sorted(worker.held)[:count]:
                    while key in worker.held:
                        self.finish(worker, key, min(worker.held[key][1]))
            self.time_passes(0.0)

    @rule(
        seconds=st.sampled_from([0.0, 0.0, 0.1, 1.0, 3.0]),
        cached=st.integers(0, 500),
        slots=st.sampled_from([0, 0, SLOTS, 2]),
    )
    def time_passes(self, seconds: float, cached: int = 0, slots: int = 0) -> None:
        self.now += seconds
        for peer, gateway in list(self.gateways.items()):
            self.send(FromGateway(peer, GatewayBeat(1, digest(gateway.open_choices()))))
        for worker in list(self.workers.values()):
            mark = digest(worker.open_choices())
            self.from_worker(
                worker,
                WorkerBeat(worker.lease, 1, len(worker.held), 0, 0, mark, slots),
                (prefix_names(as_array("I", range(cached + 1)), ""),),
            )
        assert self.is_lossy or not self.answers, "asked for a list though nothing was lost"
        self.send(Tick())
        self.check_nobody_idles()

    # what must hold -----------------------------------------------------------------------

    @invariant()
    def the_tables_agree(self) -> None:
        self.core.check_integrity()

    @invariant()
    def the_queue_is_bounded(self) -> None:
        assert self.core.state.waiting_count <= 4 * MAX_QUEUE

    @invariant()
    def nothing_ends_twice(self) -> None:
        twice = {key: count for key, count in self.ends.items() if count > 1}
        assert not twice

    def teardown(self) -> None:
        """When nothing gets lost any more all agree; after all deadlines nothing is left anywhere."""
        self.to_lose.clear()
        for _ in range(3):
            self.time_passes(0.0)
        self.is_lossy = False
        self.time_passes(0.0)
        self.now += 60.0
        for _ in range(10):
            self.time_passes(3.0)
        state = self.core.state
        assert state.waiting_count == len(state.deadlines) == len(state.recent) == 0
        assert not any(gateway.requests for gateway in state.gateways.values())
        assert not any(worker.holds for worker in state.workers.values())
        assert not any(worker.held for worker in self.workers.values())
        assert not any(gateway.open_choices() for gateway in self.gateways.values())
        assert not any(model.waiting.classes for model in state.models.values())


class FcfsMachine(Machine):
    policy = "fcfs"


class AutoMachine(Machine):
    policy = "auto"


_SETTINGS = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestRandomHistoriesWithLengthCohorts = Machine.TestCase
TestRandomHistoriesWithLengthCohorts.settings = _SETTINGS
TestRandomHistoriesWithTheDefault = AutoMachine.TestCase
TestRandomHistoriesWithTheDefault.settings = _SETTINGS
TestRandomHistoriesWithFirstComeFirstServed = FcfsMachine.TestCase
TestRandomHistoriesWithFirstComeFirstServed.settings = _SETTINGS
