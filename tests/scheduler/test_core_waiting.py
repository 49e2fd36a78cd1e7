"""The queue under every policy and random histories: sound, cohorts that fit, nobody passed too often."""

from __future__ import annotations

from collections import Counter

from core_driver import GATEWAY, card
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sfllm.messages import Capacity, Sampling, Submit
from sfllm.wire import as_array
from sfllm_scheduler.core.cohorts import POLICIES, Room
from sfllm_scheduler.core.requests import Key, Rank, Request
from sfllm_scheduler.core.waiting import WaitingRequests
from sfllm_scheduler.core.waiting_check import check_waiting
from sfllm_scheduler.core.workers import Worker

LENGTHS = st.sampled_from([10, 12, 60, 200, 400, 900, 3000]) | st.integers(1, 3500)
PRIORITIES = st.sampled_from([0, 0, 0, 1, -3])
TENANTS = st.sampled_from(["a", "a", "b", "c"])


class Queue(RuleBasedStateMachine):
    """Requests come, leave and come back; workers of two sizes ask for cohorts and release what they had."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)), bound=st.sampled_from([0, 1, 3, 16]))
    def begin(self, policy: str, bound: int) -> None:
        self.name, self.bound = policy, bound
        self.policy = POLICIES[policy]
        self.waiting = WaitingRequests(fair=self.policy.fair, weights={"c": 2.5})
        self.workers = [
            Worker(b"l", "large", card(), Capacity(8, 9000, 1024), 0.0),
            Worker(b"s", "small", card(), Capacity(4, 1200, 512), 0.0),
        ]
        self.now = 100.0
        self.number = 0
        self.live: list[Request] = []
        self.granted: list[tuple[Request, Worker]] = []
        self.passed: Counter[Request] = Counter()

    def add(self, tokens: int, rank: Rank, tenant: str, priority: int, cached: float, suspects: int) -> None:
        self.number += 1
        submit = Submit(
            request_id=f"r{self.number}",
            handle=self.number,
            attempt=0,
            model="m",
            choices=(0,),
            generated_counts=(0,),
            sampling=Sampling(max_tokens=50, seed=1),
            priority=priority,
            milliseconds_left=0,
            tenant=tenant,
            last_worker="large" if self.number % 3 else "",
            suspects=suspects,
        )
        arrays = (as_array("I", [1] * tokens), as_array("I", ()), as_array("Q", ()))
        request = Request(Key(GATEWAY, self.number), submit, arrays, "m", rank, self.now)
        request.expect_uncached(int(tokens * (1 - cached)))
        request.latest_start = self.now + 7.0 * (self.number % 5)
        request.late_at = self.now + 1.5 * (self.number % 4)
        self.waiting.add(request)
        self.live.append(request)

    @rule(
        sizes=st.lists(LENGTHS, min_size=1, max_size=8),
        tenant=TENANTS,
        priority=PRIORITIES,
        cached=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
        suspects=st.sampled_from([0, 0, 0, 3]),
    )
    def requests_come(
        self, sizes: list[int], tenant: str, priority: int, cached: float, suspects: int
    ) -> None:
        for size in sizes:
            self.add(size, Rank(self.now, self.number + 1), tenant, priority, cached, suspects)

    @rule(seconds=st.sampled_from([0.01, 0.5, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def one_leaves(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.live))
        self.live.remove(request)
        self.waiting.remove(request)

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), how=st.sampled_from(["end", "end", "lost"]))
    def one_ends(self, data: st.DataObject, how: str) -> None:
        request, worker = data.draw(st.sampled_from(self.granted))
        self.granted.remove((request, worker))
        self.take(worker, request, -1)
        if how == "end":
            self.waiting.settle(request, 40.0 - request.expected_output)
            return
        self.waiting.refund(request)
        self.add(request.tokens, request.rank, request.submit.tenant, request.priority, 0.0, 0)

    @rule(
        data=st.data(), avoid=st.booleans(), share=st.integers(1, 9), window=st.sampled_from([1, 700, 9000])
    )
    def a_worker_asks(self, data: st.DataObject, avoid: bool, share: int, window: int) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        anchor = self.policy.anchor(self.waiting, self.now)
        assert (anchor is None) == (self.waiting.ordinary_count == 0)
        assert anchor is None or anchor in self.waiting
        room = Room(worker, share, avoid=avoid, prefill_tokens=window)
        cohort = self.policy.cohort(self.waiting, room, self.now, self.bound)
        assert len(set(cohort)) == len(cohort) <= share
        if not cohort:
            self.check_that_nothing_could_go(worker, avoid)
            return
        self.check_budget(cohort, worker, window)
        self.note_passes(cohort, worker)
        self.waiting.grant(cohort, self.bound)
        for request in cohort:
            self.take(worker, request, 1)
            self.live.remove(request)
        self.granted += ((request, worker) for request in cohort)

    def take(self, worker: Worker, request: Request, sign: int) -> None:
        """A worker's credits as they are taken and given back."""
        worker.used_slots += sign * worker.slots_for(request)
        worker.used_kv_tokens += sign * worker.charge(request)

    def check_budget(self, cohort: list[Request], worker: Worker, window: int) -> None:
        step = worker.capacity.step_tokens
        assert sum(request.tokens for request in cohort[1:]) <= max(0, step - cohort[0].tokens)
        assert sum(min(request.tokens, step) for request in cohort[:-1]) < window

    def note_passes(self, cohort: list[Request], worker: Worker) -> None:
        """Who was passed by this cohort on a worker that could have run it."""
        bound = 0 if self.name == "fcfs" else self.bound
        chosen = set(cohort)
        for request in self.live:
            if request in chosen or request.suspects or not worker.can_ever_run(request):
                continue
            self.passed[request] += sum(
                other.rank > request.rank and self.line_of(other) == self.line_of(request) for other in cohort
            )
            assert self.passed[request] <= bound

    def line_of(self, request: Request) -> tuple[int, str]:
        return request.priority, request.submit.tenant if self.policy.fair else ""

    def check_that_nothing_could_go(self, worker: Worker, avoid: bool) -> None:
        """At least the oldest of each line, if few enough stand before it to be looked past, did not fit."""
        room = Room(worker, 1, avoid=avoid)
        if len(self.live) <= 8 and not room.complete:
            oldest: dict[tuple[int, str], Request] = {}
            for request in sorted(self.live, key=lambda request: request.rank, reverse=True):
                if not request.suspects and worker.can_ever_run(request):
                    oldest[self.line_of(request)] = request
            assert not any(map(room.fits, oldest.values()))

    @invariant()
    def the_queue_is_sound(self) -> None:
        if hasattr(self, "waiting"):
            check_waiting("m", self.waiting)
            assert set(self.waiting.by_submission()) == set(self.live)


Queue.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRandomQueues = Queue.TestCase
