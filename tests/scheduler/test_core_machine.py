"""Random histories of gateways, workers and requests, against the invariants of the core."""

from __future__ import annotations

from collections import defaultdict

from core_driver import EPOCH, card, finished
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sfllm.messages import (
    ALL_CHOICES,
    Admitted,
    Cancel,
    Capacity,
    Finished,
    GatewayBeat,
    GatewayHello,
    Grant,
    GrantedRequest,
    Interrupted,
    Message,
    Rejected,
    Sampling,
    Submit,
    WorkerBeat,
    WorkerBye,
    WorkerCancel,
    WorkerDraining,
    WorkerFault,
    WorkerFinished,
    WorkerHello,
    WorkerWelcome,
)
from sfllm.wire import as_array
from sfllm_scheduler.core.core import SchedulerCore
from sfllm_scheduler.core.events import (
    Event,
    FromGateway,
    FromWorker,
    GatewayUnreachable,
    Tick,
    ToGateway,
    ToWorker,
    WorkerUnreachable,
)
from sfllm_scheduler.core.state import PolicyValues

MAX_OVERTAKES = 1
MAX_QUEUE = 12
SLOTS = 4
KV_TOKENS = 600

Key = tuple[bytes, int]


class FakeWorker:
    """What a worker would believe: its lease and the choices it still has to finish."""

    def __init__(self) -> None:
        self.lease = 0
        self.held: dict[tuple[Key, int], tuple[GrantedRequest, set[int]]] = {}
        self.draining = False


class FakeRequest:
    """What a gateway would believe of one of its requests."""

    def __init__(self, submit: Submit, tokens: int) -> None:
        self.submit = submit
        self.tokens = tokens
        self.ended = False
        self.finished: set[int] = set()
        self.waits = False
        self.passed_by = 0


class Machine(RuleBasedStateMachine):
    policy = "length"

    def __init__(self) -> None:
        super().__init__()
        values = PolicyValues(
            policy=self.policy,
            max_overtakes=MAX_OVERTAKES,
            max_queue_requests=MAX_QUEUE,
            worker_wait_seconds=8.0,
        )
        self.core = SchedulerCore(values, EPOCH)
        self.now = 0.0
        self.gateways: dict[bytes, dict[int, FakeRequest]] = {}
        self.workers: dict[bytes, FakeWorker] = {}
        self.arrivals: dict[Key, int] = {}
        self.names = 0
        self.ends: dict[tuple[Key, int], int] = defaultdict(int)

    # what the peers see ---------------------------------------------------------------

    def send(self, event: Event) -> None:
        for action in self.core.handle(event, self.now):
            if isinstance(action, ToGateway):
                self.gateway_hears(action.peer, action.message)
            elif isinstance(action, ToWorker):
                self.worker_hears(action.peer, action.message)

    def gateway_hears(self, peer: bytes, message: Message) -> None:
        assert peer in self.gateways, "a message for a gateway that is gone"
        if not isinstance(message, Admitted | Rejected | Interrupted | Finished):
            return
        request = self.gateways[peer].get(message.handle)
        if request is None or request.submit.attempt != message.attempt:
            return
        key = ((peer, message.handle), message.attempt)
        match message:
            case Admitted():
                assert not request.ended
                if not request.waits and key not in self.held_attempts():
                    request.waits, request.passed_by = True, 0
            case Rejected():
                request.waits = False
                request.ended = True
                self.ends[key] += 1
            case Interrupted():
                request.waits = False
                self.ends[key] += message.cause != "already_ended"
            case Finished():
                assert message.choice not in request.finished, "a choice finished twice"
                request.finished.add(message.choice)
                if request.finished == set(request.submit.choices):
                    request.ended = True
                    self.ends[key] += 1

    def held_attempts(self) -> set[tuple[Key, int]]:
        return {key for worker in self.workers.values() for key in worker.held}

    def worker_hears(self, peer: bytes, message: Message) -> None:
        worker = self.workers[peer]
        if isinstance(message, WorkerWelcome):
            worker.lease, worker.held = message.lease, {}
        elif isinstance(message, Grant):
            assert message.lease == worker.lease
            assert not worker.draining, "a grant for a worker that drains"
            self.check_overtaking(message)
            for entry in message.requests:
                worker.held[(entry.gateway, entry.handle), entry.attempt] = (entry, set(entry.choices))
                self.gateways[entry.gateway][entry.handle].waits = False
            used = [entry for entry, _ in worker.held.values()]
            assert sum(len(entry.choices) for entry in used) <= SLOTS
            assert sum(entry.prompt_count for entry in used) <= KV_TOKENS
        elif isinstance(message, WorkerCancel):
            assert message.lease == worker.lease
            self.let_go(worker, message)

    def let_go(self, worker: FakeWorker, cancel: WorkerCancel) -> None:
        """A worker frees what it is told to cancel, and says nothing."""
        for key, (_, open_choices) in list(worker.held.items()):
            (gateway, handle), attempt = key
            if (gateway, handle) == (cancel.gateway, cancel.handle) and attempt <= cancel.attempt:
                open_choices.difference_update(
                    open_choices if cancel.choice == ALL_CHOICES else {cancel.choice}
                )
                if not open_choices:
                    del worker.held[key]

    def check_overtaking(self, grant: Grant) -> None:
        granted = {(entry.gateway, entry.handle) for entry in grant.requests}
        for gateway, requests in self.gateways.items():
            for handle, request in requests.items():
                key = (gateway, handle)
                if not request.waits or key in granted:
                    continue
                for other in granted:
                    rival = self.gateways[other[0]][other[1]]
                    if (
                        rival.submit.priority == request.submit.priority
                        and self.arrivals[other] > self.arrivals[key]
                    ):
                        request.passed_by += 1
                assert request.passed_by <= MAX_OVERTAKES, f"{key} was passed too often"

    # what happens -----------------------------------------------------------------------

    @precondition(lambda self: len(self.gateways) < 3)
    @rule()
    def gateway_joins(self) -> None:
        self.names += 1
        peer = b"g-%d" % self.names
        self.gateways[peer] = {}
        self.send(FromGateway(peer, GatewayHello(1)))

    @precondition(lambda self: len(self.workers) < 3)
    @rule()
    def worker_joins(self) -> None:
        self.names += 1
        peer = b"w-%d" % self.names
        self.workers[peer] = FakeWorker()
        self.hello(peer)

    def hello(self, peer: bytes) -> None:
        capacity = Capacity(SLOTS, KV_TOKENS, 256)
        self.send(FromWorker(peer, WorkerHello(peer.decode(), card(max_model_len=500), capacity)))

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
            self.gateways[peer][self.names] = FakeRequest(submit, tokens)
            self.arrivals[peer, self.names] = self.names
            self.resend(peer, self.names)

    def resend(self, peer: bytes, handle: int) -> None:
        request = self.gateways[peer][handle]
        self.send(
            FromGateway(peer, request.submit, (as_array("I", range(request.tokens)), as_array("I", ())))
        )

    def some_request(self, data: st.DataObject) -> tuple[bytes, int] | None:
        keys = [(peer, handle) for peer, requests in sorted(self.gateways.items()) for handle in requests]
        return data.draw(st.sampled_from(keys)) if keys else None

    @rule(data=st.data(), newer=st.booleans())
    def submits_again(self, data: st.DataObject, newer: bool) -> None:
        key = self.some_request(data)
        if key is None or self.gateways[key[0]][key[1]].ended:
            return
        request = self.gateways[key[0]][key[1]]
        if newer and not request.finished:
            request.waits = False
            request.submit = Submit(
                **{name: getattr(request.submit, name) for name in request.submit.__struct_fields__}
                | {"attempt": request.submit.attempt + 1}
            )
        self.resend(*key)

    @rule(data=st.data(), one=st.booleans())
    def cancels(self, data: st.DataObject, one: bool) -> None:
        key = self.some_request(data)
        if key is None:
            return
        request = self.gateways[key[0]][key[1]]
        choice = 0 if one else ALL_CHOICES
        self.send(FromGateway(key[0], Cancel(key[1], request.submit.attempt, choice, "test")))
        if not one or len(request.submit.choices) == 1:
            del self.gateways[key[0]][key[1]]

    @rule(data=st.data(), fault=st.booleans())
    def worker_ends_one(self, data: st.DataObject, fault: bool) -> None:
        busy = sorted(peer for peer, worker in self.workers.items() if worker.held)
        if not busy:
            return
        peer = data.draw(st.sampled_from(busy))
        worker = self.workers[peer]
        key = data.draw(st.sampled_from(sorted(worker.held)))
        entry, open_choices = worker.held[key]
        if fault:
            del worker.held[key]
            message = WorkerFault(
                worker.lease, entry.gateway, entry.handle, entry.attempt, "engine_failure", "x"
            )
            self.send(FromWorker(peer, message))
            return
        choice = open_choices.pop()
        if not open_choices:
            del worker.held[key]
        self.send(FromWorker(peer, WorkerFinished(worker.lease, entry.gateway, finished(entry, choice))))

    @precondition(lambda self: self.workers)
    @rule(count=st.integers(1, 4), turns=st.integers(1, 4))
    def workers_go_on(self, count: int, turns: int) -> None:
        """Some turns in which workers finish a few requests each and get others."""
        for _ in range(turns):
            for peer, worker in list(self.workers.items()):
                for key in sorted(worker.held)[:count]:
                    entry, open_choices = worker.held.pop(key)
                    for choice in sorted(open_choices):
                        end = finished(entry, choice)
                        self.send(FromWorker(peer, WorkerFinished(worker.lease, entry.gateway, end)))
            self.time_passes(0.0)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), how=st.sampled_from(["bye", "unreachable", "again", "drain"]))
    def worker_changes(self, data: st.DataObject, how: str) -> None:
        peer = data.draw(st.sampled_from(sorted(self.workers)))
        worker = self.workers[peer]
        if how == "again":
            self.hello(peer)
            worker.draining = False
        elif how == "drain":
            worker.draining = True
            self.send(FromWorker(peer, WorkerDraining(worker.lease)))
        else:
            gone = FromWorker(peer, WorkerBye(worker.lease)) if how == "bye" else WorkerUnreachable(peer)
            self.send(gone)
            del self.workers[peer]

    @precondition(lambda self: self.gateways)
    @rule(data=st.data(), again=st.booleans())
    def gateway_changes(self, data: st.DataObject, again: bool) -> None:
        peer = data.draw(st.sampled_from(sorted(self.gateways)))
        if again:
            self.send(FromGateway(peer, GatewayHello(1)))
            return
        self.send(GatewayUnreachable(peer))
        del self.gateways[peer]

    @rule(seconds=st.sampled_from([0.0, 0.0, 0.1, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for peer in list(self.gateways):
            self.send(FromGateway(peer, GatewayBeat(1)))
        for peer, worker in list(self.workers.items()):
            self.send(FromWorker(peer, WorkerBeat(worker.lease, 1, len(worker.held), 0, 0)))
        self.send(Tick())
        self.check_nobody_idles()

    # what must hold -----------------------------------------------------------------------

    def check_nobody_idles(self) -> None:
        state = self.core.state
        for worker in state.workers.values():
            model = state.models["m"]
            if not worker.holds and not worker.draining:
                runnable = [r for r in model.waiting.by_submission() if worker.can_ever_run(r)]
                assert not runnable, f"{worker.worker_id} idles while {len(runnable)} requests wait"

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
        """After all deadlines everything has ended, and at idle nothing is left."""
        self.now += 60.0
        for _ in range(10):
            self.time_passes(3.0)
        state = self.core.state
        assert state.waiting_count == len(state.deadlines) == len(state.recent) == 0
        assert not any(gateway.requests for gateway in state.gateways.values())
        assert not any(worker.holds for worker in state.workers.values())
        assert not any(model.waiting.classes for model in state.models.values())


class FcfsMachine(Machine):
    policy = "fcfs"


_SETTINGS = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestRandomHistoriesWithLengthCohorts = Machine.TestCase
TestRandomHistoriesWithLengthCohorts.settings = _SETTINGS
TestRandomHistoriesWithFirstComeFirstServed = FcfsMachine.TestCase
TestRandomHistoriesWithFirstComeFirstServed.settings = _SETTINGS
