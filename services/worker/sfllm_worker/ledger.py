"""Which requests this worker holds, and at which attempt: pure, so that it can be simulated.

The scheduler may send a grant or a cancel twice, late or out of order. The ledger turns
them into sequences to start and sequences to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from sfllm.holdings import OpenChoice, fingerprint
from sfllm.messages import ALL_CHOICES, GrantedRequest
from sfllm.wire import Array
from sfllm_worker.engine.sequence import Sequence


class RequestKey(NamedTuple):
    """A request's identity on the wire: the gateway's routing id and its handle there."""

    gateway: bytes
    handle: int


@dataclass(eq=False)
class HeldRequest:
    """A request that this worker serves. `open_choices` have not finished; times are monotonic seconds.

    `traceparent` is as in `Submit`. `problem` is why it could not be served, set before it ends.
    """

    key: RequestKey
    attempt: int
    request_id: str
    prompt_count: int
    open_choices: set[int]
    queue_seconds: float
    granted_at: float
    traceparent: str = ""
    problem: str = ""
    sequences: dict[int, Sequence] = field(default_factory=dict)
    admitted_at: float | None = None
    first_token_at: float | None = None


class Stopped(NamedTuple):
    """What a cancel means for the engine: sequences to remove, choices that must not branch off."""

    sequences: list[Sequence]
    forks: list[tuple[Sequence, int]]


class Ledger:
    """Owner of the held requests. Invariant: a request is held exactly while a choice of it is open.

    `digest` is that of all open choices, which beats carry. `on_end` hears of each traced request that is
    held no more; choices of it are open still if it was cancelled.
    """

    def __init__(
        self, max_sequences: int, on_end: Callable[[HeldRequest], None] = lambda _held: None
    ) -> None:
        self._max_sequences = max_sequences
        self._on_end = on_end
        self._held: dict[RequestKey, HeldRequest] = {}
        self.digest = 0

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, key: RequestKey) -> HeldRequest:
        return self._held[key]

    def get(self, key: RequestKey) -> HeldRequest | None:
        """The request, or None when it is not held."""
        return self._held.get(key)

    def held(self) -> list[HeldRequest]:
        """Every held request."""
        return list(self._held.values())

    def clear(self) -> None:
        """Hold nothing any more."""
        for held in self.held():
            self._forget(held)
        self.digest = 0

    def accept(
        self, granted: GrantedRequest, prompt: list[int], generated: list[list[int]], now: float
    ) -> HeldRequest | None:
        """Hold a granted request and make its sequences; None when it is a repeat or out of date.

        An older attempt of it must have been cancelled before.
        """
        key = RequestKey(granted.gateway, granted.handle)
        if key in self._held:
            return None
        held = HeldRequest(
            key=key,
            attempt=granted.attempt,
            request_id=granted.request_id,
            prompt_count=len(prompt),
            open_choices=set(granted.choices),
            queue_seconds=granted.queue_seconds,
            granted_at=now,
            traceparent=granted.traceparent,
        )
        for sequence in _sequences(key, granted, prompt, generated, self._max_sequences):
            held.sequences[sequence.choice] = sequence
        self._held[key] = held
        for choice in held.open_choices:
            self._toggle(held, choice)
        return held

    def track(self, sequence: Sequence) -> HeldRequest:
        """The request of a sequence that just made progress, which now also knows a new branch."""
        assert isinstance(sequence.key, RequestKey)
        held = self._held[sequence.key]
        held.sequences.setdefault(sequence.choice, sequence)
        return held

    def finish(self, held: HeldRequest, choice: int) -> None:
        """An open choice ended."""
        held.open_choices.remove(choice)
        self._toggle(held, choice)
        held.sequences.pop(choice, None)
        if not held.open_choices:
            self._forget(held)

    def cancel(self, key: RequestKey, attempt: int, choice: int) -> Stopped:
        """Stop one choice or all of them, if the request is held at this attempt or an earlier one."""
        stopped = Stopped([], [])
        held = self._held.get(key)
        if held is None or held.attempt > attempt:
            return stopped
        if choice == ALL_CHOICES:
            stopped.sequences.extend(held.sequences.values())
            for open_choice in held.open_choices:
                self._toggle(held, open_choice)
            self._forget(held)
        elif choice in held.open_choices:
            self._cancel_choice(held, choice, stopped)
        return stopped

    def _cancel_choice(self, held: HeldRequest, choice: int, stopped: Stopped) -> None:
        sequence = held.sequences.get(choice)
        if sequence is None:
            leader = next(s for s in held.sequences.values() if choice in s.fork_choices)
            stopped.forks.append((leader, choice))
        elif sequence.fork_choices:
            # Others still branch off this one: it goes on in the place of the first of them.
            heir = sequence.fork_choices[0]
            stopped.forks.append((sequence, heir))
            sequence.choice = heir
            held.sequences[heir] = sequence
        else:
            stopped.sequences.append(sequence)
        self.finish(held, choice)

    def _forget(self, held: HeldRequest) -> None:
        del self._held[held.key]
        if held.traceparent:
            self._on_end(held)

    def _toggle(self, held: HeldRequest, choice: int) -> None:
        """A choice became open, or is open no more."""
        self.digest ^= fingerprint(OpenChoice(held.key.gateway, held.key.handle, held.attempt, choice))


def _sequences(
    key: RequestKey,
    granted: GrantedRequest,
    prompt: list[int],
    generated: list[list[int]],
    max_sequences: int,
) -> Iterator[Sequence]:
    """One sequence for choices that start together, and one for each that already has output.

    More choices than a step has room for start in several groups, each with its own prefill.
    """
    fresh = [choice for choice, tokens in zip(granted.choices, generated, strict=True) if not tokens]
    for start in range(0, len(fresh), max_sequences):
        leader, *forks = fresh[start : start + max_sequences]
        yield Sequence(
            *(key, leader, list(prompt), len(prompt), granted.sampling, tuple(forks)),
            cache_salt=granted.cache_salt,
        )
    for choice, tokens in zip(granted.choices, generated, strict=True):
        if tokens:
            yield Sequence(
                *(key, choice, prompt + tokens, len(prompt), granted.sampling),
                cache_salt=granted.cache_salt,
            )


def split_grant(
    requests: tuple[GrantedRequest, ...], prompts: Array, outputs: Array, prefixes: Array
) -> Iterator[tuple[GrantedRequest, list[int], list[list[int]], list[int]]]:
    """The requests of a grant with their slices of its arrays. Raises ValueError when those do not fit."""
    for request in requests:
        _check(request)
    if sum(r.prompt_count for r in requests) != len(prompts):
        raise ValueError("the grant's prompt counts do not add up")
    if sum(sum(r.generated_counts) for r in requests) != len(outputs):
        raise ValueError("the grant's output counts do not add up")
    if sum(r.prefix_count for r in requests) != len(prefixes):
        raise ValueError("the grant's counts of beginnings do not add up")
    prompt_at = output_at = name_at = 0
    for request in requests:
        prompt = prompts[prompt_at : prompt_at + request.prompt_count].tolist()
        prompt_at += request.prompt_count
        generated = []
        for count in request.generated_counts:
            generated.append(outputs[output_at : output_at + count].tolist())
            output_at += count
        names = prefixes[name_at : name_at + request.prefix_count].tolist()
        name_at += request.prefix_count
        yield request, prompt, generated, names


def _check(request: GrantedRequest) -> None:
    """Raise ValueError when no sequences can be made of a request, or no answers to it sent."""
    choices = request.choices
    if not choices or len(set(choices)) != len(choices) or len(choices) != len(request.generated_counts):
        raise ValueError(f"choices {choices} with {len(request.generated_counts)} output counts")
    if min(request.prompt_count, request.prefix_count, *request.generated_counts) < 0:
        raise ValueError("a count of tokens is negative")
    numbers = (request.attempt, *choices)
    if min(numbers) < 0 or max(numbers) >= 2**32 or not 0 <= request.handle < 2**64:
        raise ValueError("a handle, attempt or choice is out of bounds")
