"""What is told of a step (its tokens, log probabilities and ends) and of what is held, as messages. Pure."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from sfllm.errors import ECHO_LIMIT_CHARACTERS, ErrorCode
from sfllm.messages import (
    Finished,
    Message,
    PromptLogprobs,
    Timings,
    WorkerFinished,
    WorkerHeld,
    WorkerPromptLogprobs,
    WorkerTokens,
)
from sfllm.token_batch import TokenBatch
from sfllm.wire import Array, as_array
from sfllm_worker.engine.interface import Progress, PromptReport, StepResult
from sfllm_worker.ledger import HeldRequest, Ledger

_FAULTS = ("fault", "refused")


class Outgoing(NamedTuple):
    """A message for the scheduler, and its arrays."""

    message: Message
    arrays: tuple[Array, ...] = ()


class ClearOutbox:
    """In the place of a message: forget what waits to be sent, it was for a lease that is gone."""


class _End(NamedTuple):
    held: HeldRequest
    progress: Progress


class Told(NamedTuple):
    """Messages in the order in which they must leave, and requests that are to end with an error."""

    messages: list[Outgoing]
    faulted: list[tuple[HeldRequest, ErrorCode, str]]


def tell(result: StepResult, ledger: Ledger, lease: int, started: float, ended: float) -> Told:
    """Note in the ledger what a step did, and say it: first all tokens, then the ends.

    `started` and `ended` are when the step did. The engine has forgotten the sequences that finished,
    and so does the ledger.
    """
    for sequence in result.admitted:
        held = ledger.track(sequence)
        if held.admitted_at is None:
            held.admitted_at = started
    messages = [_prompt_logprobs(report, ledger, lease) for report in result.prompt_reports]
    batches: dict[bytes, TokenBatch] = defaultdict(TokenBatch)
    ends = []
    for progress in result.progress:
        sequence = progress.sequence
        held = ledger.track(sequence)
        if held.first_token_at is None:
            held.first_token_at = ended
        if progress.token is not None:
            batches[held.key.gateway].append(
                *(held.key.handle, held.attempt, sequence.choice, sequence.generated - 1, (progress.token,)),
                logprobs=progress.logprobs,
            )
        if progress.finish is not None:
            ends.append(_End(held, progress))
    messages += [Outgoing(WorkerTokens(lease, key), batch.arrays()) for key, batch in batches.items()]
    faulted = {end.held.key: _fault(end) for end in ends if end.progress.finish in _FAULTS}
    for held, _code, reason in faulted.values():
        held.problem = reason
    for held, progress in ends:
        ledger.finish(held, progress.sequence.choice)
    messages += [_finished(end, lease, ended) for end in ends if end.progress.finish not in _FAULTS]
    return Told(messages, list(faulted.values()))


def _fault(end: _End) -> tuple[HeldRequest, ErrorCode, str]:
    if end.progress.finish == "refused":
        return end.held, ErrorCode.INVALID_REQUEST, end.progress.problem[:ECHO_LIMIT_CHARACTERS]
    return end.held, ErrorCode.ENGINE_FAILURE, "the model's output was not finite"


def resend(held: HeldRequest, choice: int, start: int, lease: int) -> Outgoing | None:
    """The tokens `start ..` of an open choice once more, without log probabilities; None without any."""
    sequence = held.sequences.get(choice)
    if sequence is None or not 0 <= start < sequence.generated:
        return None
    batch = TokenBatch()
    tokens = sequence.tokens[sequence.prompt_count + start :]
    batch.append(held.key.handle, held.attempt, choice, start, tokens)
    return Outgoing(WorkerTokens(lease, held.key.gateway), batch.arrays())


def held_list(ledger: Ledger, lease: int, number: int) -> Outgoing:
    """Every open choice, as the answer to the scheduler's ask of that number."""
    gateways: dict[bytes, int] = {}
    rows = [
        (gateways.setdefault(held.key.gateway, len(gateways)), held.key.handle, held.attempt, choice)
        for held in ledger.held()
        for choice in sorted(held.open_choices)
    ]
    columns = tuple(as_array(code, (row[index] for row in rows)) for index, code in enumerate("IQII"))
    return Outgoing(WorkerHeld(lease, number, tuple(gateways)), columns)


def _prompt_logprobs(report: PromptReport, ledger: Ledger, lease: int) -> Outgoing:
    held = ledger.track(report.sequence)
    width, ids, values = report.logprobs
    header = PromptLogprobs(held.key.handle, held.attempt, report.start, width)
    message = WorkerPromptLogprobs(lease, held.key.gateway, header)
    return Outgoing(message, (as_array("I", ids), as_array("f", values)))


def _finished(end: _End, lease: int, now: float) -> Outgoing:
    held, progress = end
    sequence = progress.sequence
    assert progress.finish is not None
    assert held.admitted_at is not None
    assert held.first_token_at is not None
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
            queue_seconds=held.queue_seconds + held.admitted_at - held.granted_at,
            prefill_seconds=held.first_token_at - held.admitted_at,
            decode_seconds=now - held.first_token_at,
        ),
    )
    embedding = as_array("f", progress.embedding)
    return Outgoing(WorkerFinished(lease, held.key.gateway, finished), (embedding,))
