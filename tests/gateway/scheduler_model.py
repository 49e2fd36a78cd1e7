"""What a gateway may rely on, in small: a scheduler with its workers as one pure machine.

It keeps its side of the link's rules and nothing else: no queue, no worker of its own, no time. The tokens of
a choice are a function of its request and their position, whoever makes them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from sfllm import holdings, wire
from sfllm.holdings import OpenChoice
from sfllm.messages import (
    ALL_CHOICES,
    Admitted,
    Cancel,
    Finished,
    GatewayBeat,
    GatewayBye,
    GatewayHeld,
    GatewayHello,
    GatewayWelcome,
    Interrupted,
    ListHeld,
    Message,
    Rejected,
    Resend,
    SchedulerBeat,
    Submit,
    Timings,
    Tokens,
)
from sfllm.token_batch import NO_LOGPROBS, Logprobs, TokenBatch

LENGTH = 12
STOPS_AT = 5
BEAT_SECONDS, LEASE_SECONDS = 2.0, 6.0

Sent = tuple[Message, tuple[wire.Array, ...]]


def token(handle: int, choice: int, index: int) -> int:
    """The one true token of a position."""
    return 10_000 * handle + 100 * choice + index


def true_tokens(handle: int, choice: int) -> list[int]:
    """All tokens of a choice: odd ones stop by themselves, even ones go on to the limit."""
    return [token(handle, choice, index) for index in range(STOPS_AT if choice % 2 else LENGTH)]


@dataclass
class Live:
    """A request that the scheduler has, and how many tokens each of its open choices has."""

    submit: Submit
    counts: dict[int, int]
    asks_before: int


class SchedulerModel:
    """The peer of the gateway with the routing id `gateway`. `outgoing` collects what it says."""

    def __init__(self, gateway: bytes) -> None:
        self.gateway = gateway
        self.epoch = 0
        self.outgoing: list[Sent] = []
        self._clear()

    def _clear(self) -> None:
        self.known = False
        self.live: dict[int, Live] = {}
        self.ended: dict[int, int] = {}
        self.asks = 0

    def restart(self) -> None:
        self.epoch += 1
        self._clear()

    def beat(self) -> None:
        if self.known:
            self._say(SchedulerBeat(self.epoch))

    def take(self, message: Message, arrays: tuple[wire.Array, ...]) -> None:
        if isinstance(message, GatewayHello):
            for handle in list(self.live):
                self.interrupt(handle)
            self.known = True
            self._say(GatewayWelcome(self.epoch, BEAT_SECONDS, LEASE_SECONDS))
            return
        if not self.known:
            self._say(GatewayWelcome(self.epoch, BEAT_SECONDS, LEASE_SECONDS))
            return
        match message:
            case GatewayBeat():
                if message.digest != self.digest():
                    self.asks += 1
                    self._say(ListHeld(self.asks))
            case Submit():
                self._submit(message, arrays)
            case Cancel():
                self._cancel(message)
            case GatewayHeld():
                self._compare(message.number, arrays)
            case Resend():
                self._resend(message)
            case GatewayBye():
                self._clear()
            case _:
                raise TypeError(message)

    def digest(self) -> int:
        return holdings.digest(
            OpenChoice(self.gateway, handle, live.submit.attempt, choice)
            for handle, live in self.live.items()
            for choice in live.counts
        )

    # what workers do

    def make_tokens(self, handle: int, choice: int, count: int) -> None:
        """The worker of an open choice goes on, perhaps to its end."""
        live = self.live[handle]
        start = live.counts[choice]
        tokens = true_tokens(handle, choice)
        self._row(live.submit, choice, start, tokens[start : start + count])
        live.counts[choice] = min(start + count, len(tokens))
        if live.counts[choice] == len(tokens):
            reason = "length" if len(tokens) == LENGTH else "stop"
            submit = live.submit
            ends = (handle, submit.attempt, choice, reason, -1, 2, 0, len(tokens), Timings())
            self._say(Finished(*ends), wire.as_array("f", ()))
            self._close(handle, choice)

    def interrupt(self, handle: int, suspects: int = 0) -> None:
        attempt = self.live[handle].submit.attempt
        self._end(handle)
        self._say(Interrupted(handle, attempt, "lost", "w", suspects))

    def reject(self, handle: int) -> None:
        attempt = self.live[handle].submit.attempt
        self._end(handle)
        self._say(Rejected(handle, attempt, "engine_failure", "no"))

    # messages

    def _submit(self, submit: Submit, arrays: tuple[wire.Array, ...]) -> None:
        handle, live = submit.handle, self.live.get(submit.handle)
        if live is not None and submit.attempt <= live.submit.attempt:
            if submit.attempt == live.submit.attempt:
                self._say(Admitted(handle, submit.attempt))
            return
        if live is None and submit.attempt <= self.ended.get(handle, -1):
            if submit.attempt == self.ended[handle]:
                self._say(Interrupted(handle, submit.attempt, "already_ended", ""))
            return
        so_far = [
            token(handle, choice, index)
            for choice, count in zip(submit.choices, submit.generated_counts, strict=True)
            for index in range(count)
        ]
        assert list(arrays[1]) == so_far
        counts = dict(zip(submit.choices, submit.generated_counts, strict=True))
        self.live[handle] = Live(submit, counts, self.asks)
        self._say(Admitted(handle, submit.attempt))

    def _cancel(self, cancel: Cancel) -> None:
        live = self.live.get(cancel.handle)
        if live is None or live.submit.attempt > cancel.attempt:
            return
        if cancel.choice == ALL_CHOICES:
            self._end(cancel.handle)
        elif cancel.choice in live.counts:
            self._close(cancel.handle, cancel.choice)

    def _compare(self, number: int, arrays: tuple[wire.Array, ...]) -> None:
        listed = set(zip(*arrays, strict=True))
        for handle, attempt, choice in listed:
            live = self.live.get(handle)
            if live is None or live.submit.attempt != attempt or choice not in live.counts:
                self._say(Interrupted(handle, attempt, "lost", ""))
        for handle, live in list(self.live.items()):
            for choice in list(live.counts) if live.asks_before < number else ():
                if (handle, live.submit.attempt, choice) not in listed:
                    self._close(handle, choice)

    def _resend(self, resend: Resend) -> None:
        live = self.live.get(resend.handle)
        if live is None or live.submit.attempt != resend.attempt:
            self._say(Interrupted(resend.handle, resend.attempt, "lost", ""))
        elif resend.choice in live.counts:
            tokens = true_tokens(resend.handle, resend.choice)[resend.start : live.counts[resend.choice]]
            self._row(live.submit, resend.choice, resend.start, tokens)

    def _row(self, submit: Submit, choice: int, start: int, ids: list[int]) -> None:
        batch = TokenBatch()
        batch.append(submit.handle, submit.attempt, choice, start, ids, logprobs_of(ids, submit))
        self._say(Tokens(), *batch.arrays())

    def _close(self, handle: int, choice: int) -> None:
        del self.live[handle].counts[choice]
        if not self.live[handle].counts:
            self._end(handle)

    def _end(self, handle: int) -> None:
        self.ended[handle] = self.live.pop(handle).submit.attempt

    def _say(self, message: Message, *arrays: wire.Array) -> None:
        wire.encode(message, *arrays)
        self.outgoing.append((message, arrays))


def logprobs_of(ids: list[int], submit: Submit) -> Logprobs:
    if submit.sampling.logprobs < 0:
        return NO_LOGPROBS
    return Logprobs(1, ids, array("f", [-0.5] * len(ids)))
