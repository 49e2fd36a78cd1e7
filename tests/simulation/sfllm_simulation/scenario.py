"""Scenarios from seeds: some requests, some faults, all from one random.Random."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .script import (
    Crash,
    Cut,
    Drain,
    Event,
    FailStep,
    Leave,
    Noise,
    Open,
    Pause,
    Poison,
    Script,
    Setup,
    SlowStep,
    StopChoice,
)

LOAD_SECONDS = 4.0
"""Requests come and faults begin within so many seconds."""

POISON_CHANCE = 0.06
MOST_TOKENS = 180
"""Of a prompt and an answer together: the smallest cache and the model have room for that."""


def scenario(seed: int) -> Script:
    """The scenario of a seed: the same one always."""
    random = Random(seed)
    setup = Setup(
        seed,
        gateways=random.choice((1, 1, 2)),
        workers=random.choice((1, 2, 2, 3)),
        slots=random.choice((2, 4, 8)),
        kv_tokens=random.choice((192, 256, 512)),
        step_milliseconds=random.choice((5, 20, 60, 150, 400)),
        policy=random.choice(("auto", "auto", "length", "prefix", "fcfs")),
    )
    events: list[Event] = []
    for request in range(1, random.choice((2, 4, 8, 12)) + 1):
        events += _request(random, setup, request)
    events += [_fault(random, setup) for _ in range(random.choice((0, 1, 2, 3, 5, 8)))]
    return Script(setup, tuple(sorted(events, key=lambda event: event.t)))


def _fault(random: Random, setup: Setup) -> Event:
    return random.choice(_FAULTS)(random, setup)


def _time(random: Random) -> float:
    return round(random.uniform(0.0, LOAD_SECONDS), 2)


def _request(random: Random, setup: Setup, request: int) -> list[Event]:
    """A request, and what its client does later."""
    prompt = random.choice((1, 5, 17, 40, 60, 70, 135))
    opened = Open(
        t=_time(random),
        gateway=f"gateway-{random.randrange(setup.gateways)}",
        request=request,
        prompt=prompt,
        n=random.choice((1, 1, 1, 2, 3)),
        tokens=min(random.choice((1, 4, 20, 40, 80, 120)), MOST_TOKENS - prompt),
        priority=random.choice((0, 0, 0, 1, -1)),
        tenant=random.choice(("a", "a", "b", "c")),
        logprobs=random.choice((-1, -1, -1, 0, 2)),
        deadline=random.choice((2.0, *[600.0] * 7)),
    )
    events: list[Event] = [opened]
    if random.random() < 0.2:
        events.append(Leave(round(opened.t + random.choice((0.0, 0.01, random.uniform(0, 4))), 3), request))
    if random.random() < 0.2:
        choice, tokens = random.randrange(opened.n), random.randint(1, opened.tokens)
        events.append(StopChoice(opened.t, request, choice, tokens))
    if random.random() < POISON_CHANCE:
        events.append(
            Poison(0.0, request, random.choice(("kills", "breaks")), random.randrange(opened.tokens))
        )
    return events


def _worker(random: Random, setup: Setup) -> str:
    return f"worker-{random.randrange(setup.workers)}"


def _peer(random: Random, setup: Setup) -> str:
    """A worker or a gateway."""
    return random.choice((_worker(random, setup), f"gateway-{random.randrange(setup.gateways)}"))


def _process(random: Random, setup: Setup) -> str:
    return random.choice((_worker(random, setup), _worker(random, setup), "scheduler", _peer(random, setup)))


def _direction(random: Random, setup: Setup) -> tuple[str, str]:
    ends = [_peer(random, setup), "scheduler"]
    random.shuffle(ends)
    return ends[0], ends[1]


def _seconds(random: Random, most: float) -> float:
    return round(random.uniform(0.1, most), 2)


def _crash(random: Random, setup: Setup) -> Event:
    return Crash(_time(random), _process(random, setup), _seconds(random, 2.0))


def _drain(random: Random, setup: Setup) -> Event:
    return Drain(_time(random), _peer(random, setup), _seconds(random, 1.0))


def _fail_step(random: Random, setup: Setup) -> Event:
    return FailStep(_time(random), _worker(random, setup), _seconds(random, 1.0))


def _slow_step(random: Random, setup: Setup) -> Event:
    return SlowStep(_time(random), _worker(random, setup), _seconds(random, 6.0))


def _pause(random: Random, setup: Setup) -> Event:
    return Pause(
        _time(random), _process(random, setup), random.choice((_seconds(random, 1.5), _seconds(random, 8.0)))
    )


def _cut(random: Random, setup: Setup) -> Event:
    return Cut(
        _time(random),
        *_direction(random, setup),
        random.choice((_seconds(random, 1.5), _seconds(random, 8.0))),
    )


def _noise(random: Random, setup: Setup) -> Event:
    drops, doubles, delays = (random.choice((0, 5, 20, 50)) for _ in range(3))
    sender, receiver = _direction(random, setup)
    return Noise(_time(random), sender, receiver, drops, doubles, delays, _seconds(random, 5.0))


_FAULTS: tuple[Callable[[Random, Setup], Event], ...] = (
    _crash,
    _crash,
    _drain,
    _fail_step,
    _slow_step,
    _pause,
    _cut,
    _noise,
    _noise,
)
