"""The worker's side of the link to its scheduler, pure: messages and times in, messages out.

It joins with a hello and works under the lease that the welcome gives. Every beat carries a digest of
the choices that it holds; where the scheduler has another one it asks for the list and says what is to
go. When the scheduler is lost, silent or does not know this worker, all that is held is dropped and
the next hello begins anew: gateways submit again what they still want.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from sfllm.errors import ErrorCode
from sfllm.messages import (
    ALL_CHOICES,
    Drain,
    Grant,
    GrantedRequest,
    ListHeld,
    Message,
    Recall,
    SchedulerBeat,
    WorkerBye,
    WorkerCancel,
    WorkerDraining,
    WorkerFault,
    WorkerHello,
    WorkerResend,
    WorkerReturned,
    WorkerUnknown,
    WorkerWelcome,
)
from sfllm.traceparent import log_fields
from sfllm.wire import Array
from sfllm_worker.engine.interface import EngineInterface, StepResult
from sfllm_worker.feedback import Feedback
from sfllm_worker.ledger import HeldRequest, Ledger, RequestKey, split_grant
from sfllm_worker.protocol_checks import problem_of
from sfllm_worker.protocol_results import ClearOutbox, Outgoing, held_list, resend, tell

__all__ = ["ClearOutbox", "Outgoing", "WorkerProtocol"]

_log = structlog.get_logger()

HELLO_INTERVAL_SECONDS = 1.0


class WorkerProtocol:
    """Owner of the lease, the ledger and what the engine holds.

    Invariants: `lease` is None exactly while the scheduler has not (again) welcomed this worker, and
    then nothing is held; every sequence in the engine belongs to a request in the ledger, and the
    other way round, but for the time between a step and its `publish`. Times are monotonic seconds.
    `on_end` is as in `Ledger`.
    """

    def __init__(
        self,
        engine: EngineInterface,
        hello: WorkerHello,
        drain_seconds: float = 30.0,
        on_end: Callable[[HeldRequest], None] = lambda _held: None,
    ) -> None:
        self._engine = engine
        self._hello = hello
        self._drain_seconds = drain_seconds
        self._ledger = Ledger(engine.max_sequences, on_end)
        self._feedback = Feedback(engine)
        self._outgoing: list[Outgoing | ClearOutbox] = []
        self._welcome: WorkerWelcome | None = None
        self._heard_at = 0.0
        self._next_hello = float("-inf")
        self.next_beat = 0.0
        """When the next beat is due."""
        self._steps = 0
        self._draining_until: float | None = None
        self._drain_is_over = False
        self._has_left = False

    @property
    def lease(self) -> int | None:
        """The number under which the scheduler believes this worker; None before it has a welcome."""
        return self._welcome.lease if self._welcome is not None else None

    @property
    def beat_seconds(self) -> float:
        """How often to beat under the present lease; 0 without one."""
        return self._welcome.beat_seconds if self._welcome is not None else 0.0

    @property
    def held_requests(self) -> int:
        """How many requests are held."""
        return len(self._ledger)

    @property
    def digest(self) -> int:
        """The digest of all open choices."""
        return self._ledger.digest

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self._draining_until is not None

    @property
    def drained(self) -> bool:
        """Whether it was told to drain, and has finished or run out of time: `leave` is next."""
        return self.draining and (self._drain_is_over or not self._ledger)

    def take_outgoing(self) -> list[Outgoing | ClearOutbox]:
        """What is to be sent since the last call, in order."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def handle(self, message: Message, arrays: tuple[Array, ...], now: float) -> None:
        """Take a message of the scheduler. Read all that came before `tick`, or a lease ends too early."""
        if self._has_left:
            return
        self._heard_at = now
        match message:
            case WorkerWelcome():
                self._join(message, now)
            case WorkerUnknown() if self._welcome is not None:
                self.lose("it does not know this worker", now)
            case SchedulerBeat() if self._welcome is not None and message.epoch != self._welcome.epoch:
                self.lose("it was restarted", now)
            case ListHeld() if self._welcome is not None:
                self._outgoing.append(held_list(self._ledger, self._welcome.lease, message.number))
            case Grant() | WorkerCancel() | WorkerResend() | Recall() | Drain():
                if self.lease is not None and message.lease == self.lease:
                    self._obey(message, arrays, message.lease, now)
            case _:
                pass  # a beat, or what concerns a lease that is gone

    def tick(self, now: float) -> None:
        """Do what is due: hello, beat, the end of the lease, the end of a drain."""
        if self._has_left:
            return
        if self._welcome is not None and now - self._heard_at >= self._welcome.lease_seconds:
            self.lose("no beat within the lease", now)
        if self._draining_until is not None and now >= self._draining_until:
            self._drain_is_over = True
        if self._welcome is None:
            self._say_hello_if_due(now)
        elif now >= self.next_beat:
            self.next_beat = now + self._welcome.beat_seconds
            if self.draining:
                self._send(WorkerDraining(self._welcome.lease))  # again: the first may be lost
            self._feedback.look()
            self._outgoing.append(self._beat(self._welcome.lease))

    def seconds_to_timer(self, now: float) -> float:
        """How long the caller may wait for messages before something is due."""
        if self._welcome is None:
            due = [] if self.draining else [self._next_hello]
        else:
            due = [self.next_beat, self._heard_at + self._welcome.lease_seconds]
        if self._draining_until is not None:
            due.append(self._draining_until)
        return max(0.0, min(due) - now)

    def beat(self) -> Outgoing | None:
        """What to tell the scheduler while a step runs; None without a lease."""
        return None if self.lease is None else self._beat(self.lease)

    @property
    def step_curve(self) -> tuple[float, ...]:
        """What steps take, as the last beat said it."""
        return self._feedback.step_curve

    def publish(self, result: StepResult, started: float, ended: float) -> None:
        """Say what came of the engine's step, which nothing else may come between."""
        self._steps += 1
        self._feedback.measured(result, started, ended)
        if result.admitted or result.prompt_reports or result.progress:
            self._publish_progress(result, started, ended)
        if result.admitted or result.progress or result.shape.prefill_tokens:
            self._tell_progress()

    def _publish_progress(self, result: StepResult, started: float, ended: float) -> None:
        assert self.lease is not None, "without a lease nothing is held"
        told = tell(result, self._ledger, self.lease, started, ended)
        self._outgoing += told.messages
        for held, code, reason in told.faulted:
            self._cancel(held.key, held.attempt, ALL_CHOICES)
            self._fault(held, code, reason, self.lease)

    def check_idle(self) -> None:
        """Raise AssertionError unless everything is free while the engine has no work."""
        self._engine.check_integrity()
        assert not self._ledger, "requests are held that no sequence serves"

    def drain(self, now: float) -> None:
        """Finish what has begun, give back the rest, take no more. Repeated calls do nothing."""
        if self.draining or self._has_left:
            return
        self._draining_until = now + self._drain_seconds
        if self.lease is not None:
            self._send(WorkerDraining(self.lease))
            for held in self._ledger.held():
                if held.admitted_at is None:
                    self._cancel(held.key, held.attempt, ALL_CHOICES)
                    self._send(WorkerReturned(self.lease, *held.key, held.attempt))
        _log.info("draining", held_requests=len(self._ledger))

    def leave(self, failure: str) -> None:
        """Say goodbye; nothing is done after it. `failure` is empty after a drain.

        The engine is not touched any more: it ends with the process, and may be in any state.
        """
        if self.lease is None:
            self._outgoing = [ClearOutbox()]
        else:
            self._send(WorkerBye(self.lease, failure))
        self._ledger.clear()
        self._welcome = None
        self._has_left = True

    def part(self, now: float) -> None:
        """Say goodbye to this scheduler after a drain and be ready to join one again; drop what is left."""
        if self.lease is not None:
            self._send(WorkerBye(self.lease))
        self._drop_everything()
        self._welcome = self._draining_until = None
        self._drain_is_over = False
        self._next_hello = now

    def lose(self, reason: str, now: float) -> None:
        """The lease is void, or its messages cannot be sent any more: drop everything, join again."""
        _log.warning("lost the scheduler", reason=reason, lease=self.lease, held_requests=len(self._ledger))
        self._drop_everything()
        self._welcome = None
        self._next_hello = now
        self._outgoing = [ClearOutbox()]

    def _join(self, welcome: WorkerWelcome, now: float) -> None:
        known = self._welcome
        if known is not None and welcome.epoch == known.epoch and welcome.lease <= known.lease:
            return  # it came twice, or late
        self._drop_everything()
        self._welcome = welcome
        self._feedback.joined(welcome.shortest_first)
        self.next_beat = now
        self._outgoing = [ClearOutbox()]
        if self.draining:
            self._send(WorkerDraining(welcome.lease))
        _log.info("joined the scheduler", worker_id=self._hello.worker_id, lease=welcome.lease)

    def _say_hello_if_due(self, now: float) -> None:
        if now >= self._next_hello and not self.draining:
            self._next_hello = now + HELLO_INTERVAL_SECONDS
            self._outgoing = [ClearOutbox()]
            self._send(self._hello)

    def _beat(self, lease: int) -> Outgoing:
        return self._feedback.beat(lease, self._steps, self._ledger.digest)

    def _tell_progress(self) -> None:
        """Say what is left to prefill, if it has changed."""
        progress = None if self.lease is None else self._feedback.progress(self.lease)
        if progress is not None:
            self._outgoing.append(progress)

    def _obey(
        self,
        message: Grant | WorkerCancel | WorkerResend | Recall | Drain,
        arrays: tuple[Array, ...],
        lease: int,
        now: float,
    ) -> None:
        match message:
            case Grant():
                self._accept(message, arrays, now)
            case WorkerCancel():
                self._cancel(RequestKey(message.gateway, message.handle), message.attempt, message.choice)
                self._tell_progress()
            case Recall():
                self._give_back(message, lease)
            case WorkerResend():
                held = self._ledger.get(RequestKey(message.gateway, message.handle))
                if held is not None and held.attempt == message.attempt:
                    again = resend(held, message.choice, message.start, lease)
                    self._outgoing += [again] if again is not None else []
            case Drain():
                self.drain(now)

    def _give_back(self, recall: Recall, lease: int) -> None:
        """Let go of a request that has not begun. One that has stays: what was computed would be lost."""
        held = self._ledger.get(RequestKey(recall.gateway, recall.handle))
        if held is not None and held.attempt == recall.attempt and held.admitted_at is None:
            self._cancel(held.key, held.attempt, ALL_CHOICES)
            self._send(WorkerReturned(lease, *held.key, held.attempt))
            self._tell_progress()

    def _accept(self, grant: Grant, arrays: tuple[Array, ...], now: float) -> None:
        self._feedback.granted()
        try:
            requests = list(split_grant(grant.requests, *arrays))
        except ValueError as error:
            _log.error("malformed grant", error=str(error))
            return
        for granted, prompt, generated, names in requests:
            key = RequestKey(granted.gateway, granted.handle)
            self._cancel(key, granted.attempt - 1, ALL_CHOICES)
            if not self.draining:
                held = self._ledger.accept(granted, prompt, generated, now)
                if held is not None and self._start(held, granted, grant.lease):
                    self._note_prompt(held, names)
            elif self._ledger.get(key) is None:
                self._send(WorkerReturned(grant.lease, *key, granted.attempt))

    def _note_prompt(self, held: HeldRequest, names: list[int]) -> None:
        if names:
            first = next(iter(held.sequences.values()))
            self._feedback.prompt_came(names, self._engine.prompt_hashes(first))

    def _start(self, held: HeldRequest, granted: GrantedRequest, lease: int) -> bool:
        """Give its sequences to the engine; False when that cannot be."""
        sequences = list(held.sequences.values())
        token_lists = [sequence.tokens for sequence in sequences]
        problem = problem_of(granted, token_lists, self._engine, self._hello.card.vocab_size)
        if problem is not None:
            held.problem = problem
            self._ledger.cancel(held.key, held.attempt, ALL_CHOICES)
            self._fault(held, ErrorCode.INVALID_REQUEST, problem, lease)
            return False
        _log.debug(
            "accepted",
            **log_fields(held.request_id, held.traceparent),
            prompt_tokens=held.prompt_count,
        )
        for sequence in sequences:
            self._engine.add(sequence)
        return True

    def _cancel(self, key: RequestKey, attempt: int, choice: int) -> None:
        stopped = self._ledger.cancel(key, attempt, choice)
        for sequence in stopped.sequences:
            self._engine.cancel(sequence)
        for sequence, fork in stopped.forks:
            self._engine.cancel_fork(sequence, fork)

    def _drop_everything(self) -> None:
        for held in self._ledger.held():
            self._cancel(held.key, held.attempt, ALL_CHOICES)

    def _fault(self, held: HeldRequest, code: ErrorCode, reason: str, lease: int) -> None:
        _log.warning("request failed", **log_fields(held.request_id, held.traceparent), reason=reason)
        self._send(WorkerFault(lease, *held.key, held.attempt, code.value, reason))

    def _send(self, message: Message, *arrays: Array) -> None:
        self._outgoing.append(Outgoing(message, arrays))
