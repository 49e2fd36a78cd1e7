"""Requests coming in: repeats, the order of arrival, the queue's bound, and why some are refused."""

from __future__ import annotations

from collections.abc import Sequence

from sfllm.errors import ErrorCode, quote
from sfllm.messages import Admitted, GatewayWelcome, Interrupted, ModelCard, Submit
from sfllm.wire import Array
from sfllm_scheduler.core.endings import say_rejected
from sfllm_scheduler.core.events import ToGateway
from sfllm_scheduler.core.refusal import (
    COUNT_LIMIT,
    MAX_NAME_CHARACTERS,
    RefusedError,
    check_fits,
    check_in_time,
    check_limits,
    check_shape,
)
from sfllm_scheduler.core.requests import Key, Rank, Request
from sfllm_scheduler.core.state import Ended, Model, State
from sfllm_scheduler.core.suspects import CRASHES_ALONE_LIMIT
from sfllm_scheduler.core.urgency import LATE_SHARE

RETRY_QUEUE_FACTOR = 4
"""Retries pass the queue's bound, since their clients already read an answer; not without an end."""

MAX_AGE_MILLISECONDS = 24 * 3600 * 1000


def submit(state: State, gateway: bytes, message: Submit, arrays: Sequence[Array], now: float) -> None:
    """Take a request into the queue, or say why not. The same attempt again is acknowledged again."""
    if gateway not in state.gateways:
        answer_unknown_gateway(state, gateway)
        return
    key = Key(gateway, message.handle)
    live = state.find(key)
    if live is not None and message.attempt <= live.submit.attempt:
        if message.attempt == live.submit.attempt:
            state.to_gateway(gateway, Admitted(message.handle, message.attempt))
        return
    ended = state.recent.get(key)
    if live is None and ended is not None and message.attempt <= ended.attempt:
        _answer_ended(state, key, message, ended)
        return
    if live is not None:
        state.end(live, now)
        ended = state.recent[key]
    rank = ended.rank if ended is not None else _next_rank(state, message, now)
    try:
        _admit(state, key, message, arrays, rank, now)
    except RefusedError as refused:
        state.remember(key, message.attempt, rank, now)
        say_rejected(state, key, message, refused.code, refused.message, refused.retry_after_seconds)


def answer_unknown_gateway(state: State, gateway: bytes) -> None:
    """A welcome to who is not known tells it that this scheduler holds nothing of it."""
    policy = state.policy
    welcome = GatewayWelcome(state.epoch, policy.beat_seconds, policy.lease_seconds)
    state.emit(ToGateway(gateway, welcome))


def _admit(state: State, key: Key, message: Submit, arrays: Sequence[Array], rank: Rank, now: float) -> None:
    check_shape(message, arrays)
    if message.crashes_alone >= CRASHES_ALONE_LIMIT:
        state.record_request("quarantined", message)
        text = f"request {message.request_id} was alone on a worker at two crashes and is not tried again"
        raise RefusedError(ErrorCode.ENGINE_FAILURE, text)
    model = _model_of(state, message, now)
    request = Request(key, message, arrays, model.card.name, rank, now)
    check_fits(model, request)
    bound = state.policy.max_queue_requests
    if state.waiting_count >= (bound * RETRY_QUEUE_FACTOR if request.is_retry else bound):
        raise RefusedError(
            ErrorCode.QUEUE_FULL,
            f"{state.waiting_count} requests wait already; try again later",
            state.drain_rate.retry_after(state.waiting_count, now),
        )
    check_in_time(model, message, now)
    request.expect_uncached(model.fleet.least_uncached(request))
    request.expect_output(model.outputs.expect(request.prompt_band, message.sampling.max_tokens))
    check_limits(state.limits, request, now)
    deadline = now + message.milliseconds_left / 1000
    request.latest_start = deadline - model.pace.seconds(request.uncached, request.output.mean)
    if not request.is_retry:  # the client of a retry reads already
        wish = LATE_SHARE * state.policy.target_ttft_seconds
        request.late_at = rank.arrival + wish - model.pace.seconds(request.uncached, 0.0)
    state.enqueue(request)
    state.deadlines.add(key, message.attempt, deadline)
    state.to_gateway(key.gateway, Admitted(message.handle, message.attempt))
    state.record_request("admitted", message, attempt=message.attempt, tokens=request.tokens)


def _model_of(state: State, message: Submit, now: float) -> Model:
    """The model that is asked for. Raises `RefusedError` when there is none.

    A retry of an unknown model comes when this scheduler was restarted and the workers are not back
    yet, and so do other requests in its first moments, because gateways submit only what they know: a
    place is kept for the model, by the name that its workers give it.
    """
    model = state.model_named(message.model)
    young = now < state.started + 2 * state.policy.lease_seconds
    may_wait = message.attempt > 0 or young
    if model is None and may_wait and len(message.model) <= MAX_NAME_CHARACTERS:
        card = ModelCard(message.model, (), message.model, 0, COUNT_LIMIT, 0, (), ())
        model = state.add_model(card, now)
        if model is not None:
            model.expected = True
    if model is None or (model.expected and not may_wait):
        raise RefusedError(ErrorCode.MODEL_NOT_FOUND, f"the model {quote(message.model)} does not exist")
    return model


def _answer_ended(state: State, key: Key, message: Submit, ended: Ended) -> None:
    """A repeat of what has ended: if the gateway missed the end, this lets it go on."""
    if message.attempt == ended.attempt:
        state.to_gateway(key.gateway, Interrupted(message.handle, message.attempt, "already_ended", ""))


def _next_rank(state: State, message: Submit, now: float) -> Rank:
    """Its place in the order: that of its first attempt, also when that came to an earlier scheduler."""
    state.sequence += 1
    age = min(max(message.age_milliseconds, 0), MAX_AGE_MILLISECONDS)
    return Rank(now - age / 1000, state.sequence)
