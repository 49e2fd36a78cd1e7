"""A modelled worker's side of the protocol: grants in; progress, ends and beats out."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from sfllm.messages import (
    Drain,
    Finished,
    Grant,
    Message,
    ModelCard,
    Recall,
    Timings,
    WorkerBeat,
    WorkerBye,
    WorkerCancel,
    WorkerDraining,
    WorkerFinished,
    WorkerHello,
    WorkerProgress,
    WorkerReturned,
    WorkerWelcome,
)
from sfllm.prefixes import MAX_SUMMARY_PREFIXES
from sfllm.wire import Array, as_array
from sfllm_cli.simulate.agenda import Agenda
from sfllm_cli.simulate.engine import ModelledEngine
from sfllm_cli.simulate.profiles import Profile
from sfllm_cli.simulate.work import Key, Plan, Work

CARD = ModelCard("simulated", (), "simulated", 0, 2**31, 0, (), ())

MAX_NAMES = 8 * MAX_SUMMARY_PREFIXES
"""Beginnings of prompts that are remembered for beats, those granted last."""

Send = Callable[[bytes, Message, tuple[Array, ...]], None]
"""To the scheduler, in a worker's name."""


class Listener(Protocol):
    """What a request's client sees of its tokens; `gateways.py` does."""

    def first_token(self, gateway: int, handle: int, now: float) -> None:
        """An attempt has chosen a token for the first time."""

    def tokens_of(self, gateway: int, handle: int) -> int:
        """How many tokens it is to get in all."""

    def names_of(self, gateway: int, handle: int) -> Sequence[int]:
        """Names of its beginnings, those that its answer is part of included."""

    def lost(self, gateway: int, handle: int, left: int) -> None:
        """Its worker is gone, and so many tokens have not come."""


class ModelledWorker:
    """One run of a worker: it has a lease or none, and one step, or run of equal steps, under way.

    `on_step(rows, seconds, steps)` hears of every decode step, for the times between tokens.
    """

    def __init__(
        self,
        agenda: Agenda,
        peer: bytes,
        profile: Profile,
        send: Send,
        listener: Listener,
        digest: Callable[[bytes], int],
        on_step: Callable[[int, float, int], None],
    ) -> None:
        self.peer = peer
        self.alive = True
        self.engine = ModelledEngine(profile)
        self._agenda = agenda
        self._profile = profile
        self._send = send
        self._listener = listener
        self._digest = digest
        self._on_step = on_step
        self._lease = 0
        self._beat_seconds = 0.0
        self._grants = 0
        self._said = (0, 0)
        self._named: OrderedDict[int, None] = OrderedDict()
        self._cancelled: list[Work] = []
        self._plan: Plan | None = None
        self._began = 0.0
        self._steps = 0
        self._run = 0
        self._draining = False

    def start(self) -> None:
        """Say hello."""
        model_len = self._profile.max_model_len
        card = ModelCard(CARD.name, (), CARD.root, 0, model_len, 0, (), ())
        self._say(WorkerHello(self.peer.decode(), card, self._profile.capacity))

    def receive(self, message: Message, arrays: tuple[Array, ...]) -> None:
        """A message of the scheduler."""
        if not self.alive:
            return
        match message:
            case WorkerWelcome():
                self._join(message)
            case Grant() if message.lease == self._lease:
                self._accept(message, arrays)
            case WorkerCancel() if message.lease == self._lease:
                self._cancel((int(message.gateway), message.handle), message.attempt)
            case Recall() if message.lease == self._lease:
                self._give_back(message)
            case Drain():
                self.drain()
        self._go_on()

    def slow_down(self, factor: float) -> None:
        """From its next step on it takes so many times as long."""
        self.engine.slow_down(factor)

    def drain(self) -> None:
        """Finish what has begun, give back the rest, leave."""
        if self._draining or not self.alive:
            return
        self._draining = True
        self._say(WorkerDraining(self._lease))
        for work in self.engine.works():
            self._return(work)
        self._leave_if_drained()

    def die(self) -> None:
        """The process is killed; clients have what had come until now."""
        self._settle()
        self.alive = False
        for work in self.engine.works():
            if work not in self._cancelled:
                self._listener.lost(*work.key, self.engine.left_of(work))

    def _join(self, welcome: WorkerWelcome) -> None:
        self._lease, self._beat_seconds = welcome.lease, welcome.beat_seconds
        self.engine.shortest_first = welcome.shortest_first
        self._beat()

    def _beat(self) -> None:
        if not self.alive:
            return
        engine = self.engine
        engine.follow()
        beat = WorkerBeat(
            lease=self._lease,
            step=engine.steps,
            running=engine.running,
            waiting=engine.waiting,
            free_kv_tokens=engine.free_tokens,
            digest=self._digest(self.peer),
            slots=engine.slots,
            step_curve=tuple(engine.curve),
        )
        self._say(beat, as_array("Q", self._cached_names()))
        self._agenda.after(self._beat_seconds, self._beat)

    def _cached_names(self) -> list[int]:
        names: list[int] = []
        cache = self.engine.blocks.cache
        for name in reversed(self._named):
            if name in cache:
                names.append(name)
                if len(names) == MAX_SUMMARY_PREFIXES:
                    break
        return names

    def _accept(self, grant: Grant, arrays: tuple[Array, ...]) -> None:
        self._grants += 1
        for request in grant.requests:
            key = int(request.gateway), request.handle
            so_far = request.generated_counts[0]
            outputs = self._listener.tokens_of(*key) - so_far
            names = self._listener.names_of(*key)
            work = Work(key, request.attempt, request.prompt_count, outputs, names, so_far)
            work.granted_at, work.queue_seconds = self._agenda.now, request.queue_seconds
            if self._draining:
                self._say(WorkerReturned(self._lease, request.gateway, request.handle, request.attempt))
            else:
                self.engine.add(work)
        for name in arrays[2]:
            self._named[name] = None
            self._named.move_to_end(name)
        while len(self._named) > MAX_NAMES:
            self._named.popitem(last=False)

    def _give_back(self, recall: Recall) -> None:
        work = self.engine.find((int(recall.gateway), recall.handle))
        if work is not None and work.attempt == recall.attempt:
            self._return(work)
            self._say_progress()

    def _return(self, work: Work) -> None:
        """Let go of a request that has not begun; one that has stays."""
        if not work.begun:
            gateway, handle = work.key
            self.engine.remove(work)
            self._say(WorkerReturned(self._lease, b"%d" % gateway, handle, work.attempt))

    def _cancel(self, key: Key, attempt: int) -> None:
        """Drop a request, after the step that is under way."""
        work = self.engine.find(key)
        if work is not None and work.attempt <= attempt:
            self._cancelled.append(work)
            if self._plan is None:
                self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        """Those that have not ended in the meantime."""
        for work in self._cancelled:
            if self.engine.find(work.key) is work:
                self.engine.remove(work)
        if self._cancelled:
            self._cancelled.clear()
            self._say_progress()

    def _go_on(self) -> None:
        """Begin a step, or end a run of steps early so that what came is seen after the present one."""
        if self._plan is None:
            self._begin()
        elif self._steps > 1:
            steps = self._steps_by(self._agenda.now)
            if steps < self._steps:
                self._steps = steps
                self._run += 1
                end = self._began + self.engine.seconds(self._plan.rows, steps)
                self._agenda.at(max(end, self._agenda.now), self._end, self._run)

    def _begin(self) -> None:
        if not self.alive:
            return
        self._plan = self.engine.plan()
        if self._plan is not None:
            self._began, self._steps = self._agenda.now, self._plan.steps
            for work in self._plan.admitted:
                work.admitted_at = work.admitted_at or self._began
            self._run += 1
            self._agenda.after(self._plan.seconds, self._end, self._run)

    def _steps_by(self, now: float) -> int:
        """The step that is under way at `now`, and all before it."""
        assert self._plan is not None
        rows, elapsed = self._plan.rows, now - self._began
        return 1 + bisect_left(
            range(1, self._steps), elapsed, key=lambda steps: self.engine.seconds(rows, steps)
        )

    def _settle(self) -> None:
        """What the run under way has done so far counts, and its step that has not ended does not."""
        plan = self._plan
        if plan is not None and not plan.chunks:
            done = self._steps_by(self._agenda.now) - 1
            if done > 0:
                seconds = self.engine.seconds(plan.rows, done)
                self._complete(plan, done, seconds)
        self._plan = None
        self._run += 1

    def _end(self, run: int) -> None:
        if run != self._run or not self.alive or self._plan is None:
            return
        plan, self._plan = self._plan, None
        self._complete(plan, self._steps, self._agenda.now - self._began)
        self._drop_cancelled()
        self._begin()
        self._leave_if_drained()

    def _complete(self, plan: Plan, steps: int, seconds: float) -> None:
        if plan.rows:
            self._on_step(plan.rows, seconds / steps, steps)
        first, finished = self.engine.complete(plan, steps)
        now = self._agenda.now
        for work in first:
            if not work.first_at:
                work.first_at = now
                self._listener.first_token(*work.key, now)
        for work in finished:
            self._say_finished(work)
        if plan.chunks:
            self._say_progress()

    def _say_progress(self) -> None:
        """What is left to prefill, if that was not said yet."""
        said = self._grants, self.engine.pending_tokens
        if said != self._said:
            self._said = said
            self._say(WorkerProgress(self._lease, *said))

    def _say_finished(self, work: Work) -> None:
        gateway, handle = work.key
        finished = Finished(
            handle=handle,
            attempt=work.attempt,
            choice=0,
            reason="length",
            stop_token_id=-1,
            prompt_tokens=work.prompt_tokens,
            cached_tokens=work.cached,
            generated_tokens=self._listener.tokens_of(gateway, handle),
            timings=Timings(
                queue_seconds=work.queue_seconds + work.admitted_at - work.granted_at,
                prefill_seconds=work.first_at - work.admitted_at,
                decode_seconds=self._agenda.now - work.first_at,
            ),
        )
        self._say(WorkerFinished(self._lease, b"%d" % gateway, finished))

    def _leave_if_drained(self) -> None:
        if self._draining and self.alive and not self.engine.works():
            self._say(WorkerBye(self._lease))
            self.alive = False

    def _say(self, message: Message, *arrays: Array) -> None:
        self._send(self.peer, message, arrays)
