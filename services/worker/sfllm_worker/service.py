"""The worker's loop: drain the socket, run a step, send what came of it.

Nothing in the loop waits for anything but the model while there is work; without work it
sleeps on the socket until the next timer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator

import structlog

from sfllm.errors import ErrorCode
from sfllm.messages import (
    ALL_CHOICES,
    Drain,
    Finished,
    Grant,
    GrantedRequest,
    Message,
    PromptLogprobs,
    Sampling,
    Timings,
    WorkerBeat,
    WorkerBye,
    WorkerCancel,
    WorkerDraining,
    WorkerFault,
    WorkerFinished,
    WorkerPromptLogprobs,
    WorkerTokens,
)
from sfllm.token_batch import TokenBatch
from sfllm.wire import Array, as_array
from sfllm_worker.beats import Beater
from sfllm_worker.engine.engine import Engine, Progress, PromptReport, StepResult
from sfllm_worker.ledger import HeldRequest, Ledger, RequestKey, split_grant
from sfllm_worker.link import SchedulerLink
from sfllm_worker.metrics import WorkerMetrics

_log = structlog.get_logger()

LONGEST_WAIT_SECONDS = 0.1
"""A signal that arrives just before the loop sleeps is noticed after this long."""


class WorkerService:
    """Owner of the ledger; the only caller of the engine and the link.

    Invariant: every sequence in the engine belongs to a request in the ledger, and the other
    way round, whenever a turn of the loop ends.
    """

    def __init__(
        self,
        engine: Engine,
        link: SchedulerLink,
        metrics: WorkerMetrics,
        vocab_size: int,
        drain_seconds: float,
    ) -> None:
        self._engine = engine
        self._link = link
        self._metrics = metrics
        self._vocab_size = vocab_size
        self._drain_seconds = drain_seconds
        self._beater = Beater(self._beat_if_due)
        self._ledger = Ledger(engine.planner.limits.max_sequences)
        self._steps = 0
        self._draining_until: float | None = None
        self.turned_at = time.monotonic()
        """When the loop last came around, for the health check's thread."""

    def drain(self) -> None:
        """Finish what is held, take no more, then let `run` return. Safe to call from a signal handler."""
        if self._draining_until is None:
            self._draining_until = time.monotonic() + self._drain_seconds

    def run(self) -> None:
        """Serve until drained."""
        with self._beater:
            announced = False
            while self._draining_until is None or (
                len(self._ledger) and time.monotonic() < self._draining_until
            ):
                if self._draining_until is not None and not announced:
                    announced = self._announce_drain()
                self._turn()
        if self._link.lease is not None:
            self._link.send(WorkerBye(self._link.lease))
        self._drop_everything()
        self._link.close()

    def _announce_drain(self) -> bool:
        if self._link.lease is not None:
            self._link.send(WorkerDraining(self._link.lease))
        _log.info("draining", held_requests=len(self._ledger))
        return True

    def _turn(self) -> None:
        self.turned_at = now = time.monotonic()
        self._link.say_hello_if_due(now)
        messages, reset = self._link.receive(now)
        if reset:
            self._drop_everything()
        for message, arrays in messages:
            self._handle(message, arrays, now)
        if self._engine.has_work:
            self._step()
        elif not messages:
            self._check_idle()
            self._metrics.state(self._engine)
            self._link.wait(min(self._link.seconds_to_timer(now), LONGEST_WAIT_SECONDS))
        self._beat_if_due(now)

    def _check_idle(self) -> None:
        self._engine.planner.check_integrity()
        assert not len(self._ledger), "requests are held that no sequence serves"

    def _handle(self, message: Message, arrays: tuple[Array, ...], now: float) -> None:
        match message:
            case Grant():
                self._accept(message, arrays, now)
            case WorkerCancel() if message.lease == self._link.lease:
                key = RequestKey(message.gateway, message.handle)
                self._cancel(key, message.attempt, message.choice)
            case Drain() if message.lease == self._link.lease:
                self.drain()
            case _:
                pass  # a beat, which the link has noted, or a message of an earlier lease

    def _accept(self, grant: Grant, arrays: tuple[Array, ...], now: float) -> None:
        if grant.lease != self._link.lease:
            return
        try:
            requests = list(split_grant(grant.requests, *arrays))
        except ValueError as error:
            _log.error("malformed grant", error=str(error))
            return
        for granted, prompt, generated in requests:
            key = RequestKey(granted.gateway, granted.handle)
            self._cancel(key, granted.attempt - 1, ALL_CHOICES)
            held = self._ledger.accept(granted, prompt, generated, now)
            if held is not None:
                self._start(held, granted)

    def _start(self, held: HeldRequest, granted: GrantedRequest) -> None:
        sequences = list(held.sequences.values())
        problem = self._problem(granted, [sequence.tokens for sequence in sequences])
        if problem is not None:
            self._ledger.cancel(held.key, held.attempt, ALL_CHOICES)
            self._fault(held, ErrorCode.INVALID_REQUEST, problem)
            return
        _log.debug("accepted", request_id=held.request_id, prompt_tokens=held.prompt_count)
        for sequence in sequences:
            self._engine.add(sequence)

    def _problem(self, granted: GrantedRequest, token_lists: list[list[int]]) -> str | None:
        """Why a request cannot run here: what a gateway should have refused must not crash the model."""
        for tokens in token_lists:
            if not self._engine.fits(len(tokens)):
                return f"{len(tokens)} tokens do not fit the model's context"
            if max(tokens) >= self._vocab_size:
                return f"token id {max(tokens)} is not in the vocabulary of {self._vocab_size}"
        if any(not 0 <= token < self._vocab_size for token in _named_tokens(granted.sampling)):
            return "a token id of the sampling parameters is not in the vocabulary"
        if granted.sampling.max_tokens < 1 or any(
            count >= granted.sampling.max_tokens for count in granted.generated_counts
        ):
            return "no token is left to generate"
        return None

    def _cancel(self, key: RequestKey, attempt: int, choice: int) -> None:
        stopped = self._ledger.cancel(key, attempt, choice)
        for sequence in stopped.sequences:
            self._engine.cancel(sequence)
        for sequence, fork in stopped.forks:
            self._engine.cancel_fork(sequence, fork)

    def _drop_everything(self) -> None:
        for key in self._ledger.held_keys():
            self._cancel(key, self._ledger[key].attempt, ALL_CHOICES)

    def _step(self) -> None:
        started = time.monotonic()
        with self._beater.covering():
            result = self._engine.step()
        ended = time.monotonic()
        self._steps += 1
        for sequence in result.admitted:
            held = self._ledger.track(sequence)
            held.admitted_at = held.admitted_at or started
        for report in result.prompt_reports:
            self._send_prompt_logprobs(report)
        if result.progress:
            self._send(result, ended)
        self._metrics.step(result, ended - started)
        self._metrics.state(self._engine)

    def _send(self, result: StepResult, now: float) -> None:
        """One message of tokens for each gateway, then whatever finished."""
        lease = self._link.lease
        assert lease is not None, "without a lease nothing is held"
        batches: dict[bytes, TokenBatch] = defaultdict(TokenBatch)
        finished: list[tuple[HeldRequest, Progress]] = []
        for progress in result.progress:
            sequence = progress.sequence
            held = self._ledger.track(sequence)
            held.first_token_at = held.first_token_at or now
            if progress.token is not None:
                start = sequence.generated - 1
                batches[held.key.gateway].append(
                    *(held.key.handle, held.attempt, sequence.choice, start, (progress.token,)),
                    logprobs=progress.logprobs,
                )
            if progress.finish is not None:
                finished.append((held, progress))
        for gateway, batch in batches.items():
            self._link.send(WorkerTokens(lease, gateway), *batch.arrays())
        for held, progress in finished:
            if self._ledger.get(held.key) is held:
                self._finish(held, progress, lease, now)

    def _send_prompt_logprobs(self, report: PromptReport) -> None:
        lease = self._link.lease
        assert lease is not None, "without a lease nothing is held"
        held = self._ledger.track(report.sequence)
        width, ids, values = report.logprobs
        header = PromptLogprobs(held.key.handle, held.attempt, report.start, width)
        message = WorkerPromptLogprobs(lease, held.key.gateway, header)
        self._link.send(message, as_array("I", ids), as_array("f", values))

    def _finish(self, held: HeldRequest, progress: Progress, lease: int, now: float) -> None:
        sequence = progress.sequence
        self._ledger.finish(held, sequence.choice)
        if progress.finish == "fault":
            self._cancel(held.key, held.attempt, ALL_CHOICES)
            self._fault(held, ErrorCode.ENGINE_FAILURE, "the model's output was not finite")
            return
        assert progress.finish is not None
        admitted_at = held.admitted_at or held.granted_at
        first_token_at = held.first_token_at or now
        finished = Finished(
            handle=held.key.handle,
            attempt=held.attempt,
            choice=sequence.choice,
            reason=progress.finish,
            stop_token_id=progress.stop_token_id,
            prompt_tokens=held.prompt_count,
            cached_tokens=sequence.cached_tokens or 0,
            generated_tokens=sequence.generated,
            timings=Timings(
                queue_seconds=held.queue_seconds + admitted_at - held.granted_at,
                prefill_seconds=first_token_at - admitted_at,
                decode_seconds=now - first_token_at,
            ),
        )
        self._link.send(WorkerFinished(lease, held.key.gateway, finished))
        _log.debug("finished", request_id=held.request_id, choice=sequence.choice, reason=progress.finish)

    def _fault(self, held: HeldRequest, code: ErrorCode, message: str) -> None:
        _log.warning("request failed", request_id=held.request_id, reason=message)
        if self._link.lease is not None:
            fault = WorkerFault(
                self._link.lease, held.key.gateway, held.key.handle, held.attempt, code.value, message
            )
            self._link.send(fault)

    def _beat_if_due(self, now: float) -> None:
        """Tell the scheduler what is held. The beater's thread calls it during a long step."""
        if not self._link.beat_is_due(now):
            return
        assert self._link.lease is not None
        planner = self._engine.planner
        self._link.send(
            WorkerBeat(
                lease=self._link.lease,
                step=self._steps,
                running=len(planner.running),
                waiting=len(planner.waiting),
                free_kv_tokens=self._engine.free_kv_tokens,
            )
        )


def _named_tokens(sampling: Sampling) -> Iterator[int]:
    """Every token id that the sampling parameters name."""
    yield from sampling.stop_token_ids
    yield from sampling.allowed_token_ids
    yield from (token for token, _ in sampling.logit_bias)
    yield from (token for word in sampling.bad_words for token in word)
