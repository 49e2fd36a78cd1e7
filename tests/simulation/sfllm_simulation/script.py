"""A scenario as plain lines that people read, edit and run again.

    seed 7, 1 gateways, 2 workers of 4 slots and 512 cache tokens, steps of 20 ms
    t=0.1 gateway-0 opens request 1: prompt 12, n 2, tokens 20, priority 0, logprobs -1, deadline 60 s
    t=0.3 worker-1 crashes, back after 1.5 s

Each kind of line is a class whose template says how it is written; reading is the template backwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

_PATTERNS = {"float": r"[0-9.e+-]+", "int": r"-?[0-9]+", "str": r"\S+"}
_TYPES = {"float": float, "int": int, "str": str}


class ScriptError(ValueError):
    """A line that is none of the kinds."""


@dataclass(frozen=True)
class Line:
    """What all kinds have in common."""

    template: ClassVar[str]

    def __str__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in values.items()}
        return self.template.format(**shown)

    @classmethod
    def read(cls, text: str) -> Self | None:
        """The line that is written like this, None if it is of another kind."""
        kinds = {field.name: str(field.type) for field in fields(cls)}
        parts = re.split(r"\{(\w+)\}", cls.template)
        pattern = "".join(
            f"(?P<{part}>{_PATTERNS[kinds[part]]})" if index % 2 else re.escape(part)
            for index, part in enumerate(parts)
        )
        match = re.fullmatch(pattern, text)
        if match is None:
            return None
        return cls(**{name: _TYPES[kinds[name]](value) for name, value in match.groupdict().items()})


@dataclass(frozen=True)
class Setup(Line):
    """Who takes part. `seed` draws delays and the fate of single messages."""

    template = (
        "seed {seed}, {gateways} gateways, {workers} workers of {slots} slots and {kv_tokens} cache tokens, "
        "steps of {step_milliseconds} ms, policy {policy}"
    )
    seed: int
    gateways: int
    workers: int
    slots: int
    kv_tokens: int
    step_milliseconds: int
    policy: str

    def with_seed(self, seed: int) -> Self:
        """The same, with other luck."""
        return replace(self, seed=seed)


@dataclass(frozen=True)
class Event(Line):
    """Something that happens at second `t`."""

    t: float


@dataclass(frozen=True)
class Open(Event):
    """A client asks a gateway for `n` choices of at most `tokens` tokens after a prompt of `prompt` tokens.

    `logprobs` is as in `Sampling`; where it is above 0 the prompt's log probabilities are wanted too.
    """

    template = (
        "t={t} {gateway} opens request {request}: prompt {prompt}, n {n}, tokens {tokens}, "
        "priority {priority}, tenant {tenant}, logprobs {logprobs}, deadline {deadline} s"
    )
    gateway: str
    request: int
    prompt: int
    n: int
    tokens: int
    priority: int
    tenant: str
    logprobs: int
    deadline: float


@dataclass(frozen=True)
class Leave(Event):
    """The client of a request hangs up."""

    template = "t={t} the client of request {request} leaves"
    request: int


@dataclass(frozen=True)
class StopChoice(Event):
    """A stop string of the client: from `t` on, the choice ends as soon as it has so many tokens."""

    template = "t={t} choice {choice} of request {request} stops after {tokens} tokens"
    request: int
    choice: int
    tokens: int


@dataclass(frozen=True)
class Poison(Event):
    """Any worker that computes token `token` of a choice of this request dies of it.

    `how`: it "kills" the process, or "breaks" a step with an exception, of which the worker tells.
    """

    template = "t={t} request {request} {how} every worker at token {token}"
    request: int
    how: str
    token: int


@dataclass(frozen=True)
class Crash(Event):
    """A process is killed. Another takes its place after `down` seconds."""

    template = "t={t} {process} crashes, back after {down} s"
    process: str
    down: float


@dataclass(frozen=True)
class Drain(Event):
    """A process is told to finish (SIGTERM). Another takes its place `down` seconds after it has left."""

    template = "t={t} {process} drains, back after {down} s"
    process: str
    down: float


@dataclass(frozen=True)
class FailStep(Event):
    """An exception in the engine: the worker says so, leaves, and another takes its place."""

    template = "t={t} {process} fails a step, back after {down} s"
    process: str
    down: float


@dataclass(frozen=True)
class SlowStep(Event):
    """A worker's next step takes long. Its beats go on, from a thread of their own."""

    template = "t={t} {process} takes {seconds} s for a step"
    process: str
    seconds: float


@dataclass(frozen=True)
class Pause(Event):
    """A process stands still (SIGSTOP) and goes on later; its clock does not wait."""

    template = "t={t} {process} stands still for {seconds} s"
    process: str
    seconds: float


@dataclass(frozen=True)
class Cut(Event):
    """Nothing arrives in one direction between a process and the scheduler."""

    template = "t={t} {sender} to {receiver} is cut for {seconds} s"
    sender: str
    receiver: str
    seconds: float


@dataclass(frozen=True)
class Noise(Event):
    """Messages in one direction are lost, come twice or are overtaken, with these chances in percent."""

    template = (
        "t={t} {sender} to {receiver} drops {drops}%, doubles {doubles}%, delays {delays}% for {seconds} s"
    )
    sender: str
    receiver: str
    drops: int
    doubles: int
    delays: int
    seconds: float


KINDS: tuple[type[Event], ...] = (
    Open,
    Leave,
    StopChoice,
    Poison,
    Crash,
    Drain,
    FailStep,
    SlowStep,
    Pause,
    Cut,
    Noise,
)
OF_A_REQUEST = (Open, Leave, StopChoice, Poison)
FAULTS = (Crash, Drain, FailStep, SlowStep, Pause, Cut, Noise)


class Script(NamedTuple):
    """A whole scenario."""

    setup: Setup
    events: tuple[Event, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, (self.setup, *sorted(self.events, key=lambda event: event.t))))

    @property
    def opens(self) -> list[Open]:
        """The requests."""
        return [event for event in self.events if isinstance(event, Open)]

    def poisonous(self, request: int) -> bool:
        """Whether it kills workers."""
        return any(isinstance(event, Poison) and event.request == request for event in self.events)

    def without(self, dropped: Iterable[Event]) -> Script:
        """The same without some events, and without what belongs to requests that are opened no more."""
        gone = set(map(id, dropped))
        kept = [event for event in self.events if id(event) not in gone]
        opened = {event.request for event in kept if isinstance(event, Open)}
        kept = [event for event in kept if not isinstance(event, OF_A_REQUEST) or event.request in opened]
        return self._replace(events=tuple(kept))

    def replaced(self, event: Event, **changes: Any) -> Script:
        """The same with some values of one event changed."""
        changed = replace(event, **changes)
        return self._replace(events=tuple(changed if each is event else each for each in self.events))


def read_script(text: str) -> Script:
    """The scenario that is written like this; empty lines and lines that start with # say nothing.

    Raises ScriptError.
    """
    lines = [line.strip() for line in text.splitlines()]
    first, *rest = [line for line in lines if line and not line.startswith("#")] or [""]
    setup = Setup.read(first)
    if setup is None:
        raise ScriptError(f"not a setup: {first!r}")
    return Script(setup, tuple(map(_read_event, rest)))


def _read_event(text: str) -> Event:
    for kind in KINDS:
        event = kind.read(text)
        if event is not None:
            return event
    raise ScriptError(f"no such event: {text!r}")
