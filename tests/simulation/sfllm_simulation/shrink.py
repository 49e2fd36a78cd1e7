"""From a scenario that fails to a short one that fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from .script import Cut, Event, Noise, Open, Pause, Script, Setup, SlowStep

MOST_RUNS = 600

OTHER_SEEDS = 3
"""Without an event other messages are lost. What then happens by chance may be had with another seed."""

Fails = Callable[[Script], bool]


def shrink(script: Script, fails: Fails, most_runs: int = MOST_RUNS) -> Script:
    """The shortest scenario found by dropping events and simplifying those that are left.

    `fails` runs a scenario and says whether it fails in the way that matters; `script` does. First whole
    parts are dropped, large ones before small ones, then single events, then values are made simpler, until
    nothing more can go or `most_runs` scenarios were run.
    """
    search = _Search(fails, most_runs)
    while search.runs < most_runs:
        before = script
        script = search.drop(script)
        script = search.simplify(script)
        if script == before:
            break
    return script


class _Search:
    def __init__(self, fails: Fails, most_runs: int) -> None:
        self.runs = 0
        self._fails = fails
        self._most_runs = most_runs

    def _still_fails(self, script: Script) -> bool:
        if self.runs >= self._most_runs:
            return False
        self.runs += 1
        return self._fails(script)

    def drop(self, script: Script) -> Script:
        """Drop parts of the events: halves, quarters, ... single ones."""
        size = max(1, len(script.events) // 2)
        while True:
            script = self._drop_parts(script, size)
            if size == 1:
                return script
            size //= 2

    def _drop_parts(self, script: Script, size: int) -> Script:
        at = 0
        while at < len(script.events):
            shorter = script.without(script.events[at : at + size])
            failing = next(filter(self._still_fails, _with_other_luck(shorter, size)), None)
            if failing is None:
                at += size
            else:
                script = failing
        return script

    def simplify(self, script: Script) -> Script:
        """Make the values of the setup and of single events simpler."""
        for candidate in _smaller_setups(script):
            if self._still_fails(candidate):
                script = candidate
        index = 0
        while index < len(script.events):
            simpler = self._simplify_one(script, script.events[index])
            if simpler is None:
                index += 1
            else:
                script = simpler
        return script

    def _simplify_one(self, script: Script, event: Event) -> Script | None:
        for changes in _simpler(event):
            candidate = script.replaced(event, **changes)
            if self._still_fails(candidate):
                return candidate
        return None


def _with_other_luck(script: Script, size: int) -> Iterator[Script]:
    """The same script; for single events, which are the last to go, with other fates of messages too."""
    for more in range(OTHER_SEEDS + 1 if size == 1 else 1):
        yield script._replace(setup=script.setup.with_seed(script.setup.seed + more))


def _smaller_setups(script: Script) -> Iterator[Script]:
    """The same with fewer processes, as long as every process that an event names is there."""
    named = str(Script(script.setup, script.events))
    for kind, count in (("worker", script.setup.workers), ("gateway", script.setup.gateways)):
        fewest = 1 + max((index for index in range(count) if f"{kind}-{index}" in named), default=0)
        if fewest < count:
            yield script._replace(setup=_with_count(script, kind, fewest))


def _with_count(script: Script, kind: str, count: int) -> Setup:
    return replace(script.setup, **{f"{kind}s": count})


def _simpler(event: Event) -> Iterator[dict[str, float | str]]:
    """Changes of one event, each of which makes it simpler by itself; none applies for ever."""
    match event:
        case Open():
            yield from _simpler_request(event)
        case Noise():
            for name in ("drops", "doubles", "delays"):
                if getattr(event, name):
                    yield {name: 0}
            if event.seconds > 0.2:
                yield {"seconds": round(event.seconds / 2, 2)}
        case Cut() | Pause() | SlowStep():
            if event.seconds > 0.2:
                yield {"seconds": round(event.seconds / 2, 2)}


def _simpler_request(event: Open) -> Iterator[dict[str, float | str]]:
    if event.n > 1:
        yield {"n": event.n - 1}
    if event.tokens > 1:
        yield {"tokens": event.tokens // 2}
        yield {"tokens": event.tokens - 1}
    if event.prompt > 1:
        yield {"prompt": event.prompt // 2}
    if event.priority:
        yield {"priority": 0}
    if event.logprobs >= 0:
        yield {"logprobs": -1}
