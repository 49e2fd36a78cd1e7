"""Bugs that are planted on purpose must be found, and told in a few lines."""

from __future__ import annotations

from collections.abc import Sequence

from sfllm_simulation.report import failing, shortest
from sfllm_simulation.run import run
from sfllm_simulation.scenario import scenario
from sfllm_simulation.script import FAULTS, Open, Script, read_script
from sfllm_simulation.shrink import shrink

from sfllm.messages import Message, Tokens
from sfllm.token_batch import TokenBatch, rows
from sfllm.wire import Array
from sfllm_gateway.streams import OpenStream, StreamTable


class ForgetsToTrim(StreamTable):
    """Takes tokens that come again for new ones."""

    def handle(self, message: Message, arrays: Sequence[Array], now: float) -> None:
        if isinstance(message, Tokens):
            batch = TokenBatch()
            for row in rows(arrays):
                opened = self._streams.get(row.handle)
                known = len(opened.stream.choices[row.choice].ids) if opened is not None else row.start
                batch.append(row.handle, row.attempt, row.choice, known, row.ids, row.logprobs)
            arrays = batch.arrays()
        super().handle(message, arrays, now)


class ForgetsToCancel(StreamTable):
    """Tells nobody that a client left."""

    def release(self, opened: OpenStream, reason: str, now: float) -> None:
        self._streams.pop(opened.stream.handle, None)


def _first_failure(table: type[StreamTable], *kinds: str) -> Script:
    for script in map(scenario, range(100)):
        failure = run(script, table).failure
        if failure is not None and failure.kind in kinds:
            return script
    raise AssertionError("not found")


def test_a_gateway_that_forgets_to_trim_repeated_tokens_is_found_and_told_in_few_lines() -> None:
    script = _first_failure(ForgetsToTrim, "true tokens")
    short = shortest(script, "true tokens", ForgetsToTrim)
    assert len(short.opens) == 1
    assert len(short.events) <= 3
    assert [event for event in short.events if isinstance(event, FAULTS)]
    assert run(short).failure is None  # of the planted bug alone


def test_a_failure_is_told_as_a_script_that_fails_again() -> None:
    script = _first_failure(ForgetsToTrim, "true tokens")
    failure = run(script, ForgetsToTrim).failure
    assert failure is not None
    told = failing(script, failure, make_table=ForgetsToTrim).splitlines()
    assert told[0].startswith("true tokens: choice 0 of request ")
    lines = [line for line in told if line.startswith(("seed", "t="))]
    again = run(read_script("\n".join(lines)), ForgetsToTrim).failure
    assert again is not None
    assert f"{again.text} (at t={again.time:.3f})" == told[0]


def test_a_gateway_that_loses_streams_is_found() -> None:
    assert _first_failure(ForgetsToCancel, "leaks", "digests")


def test_shrinking_ends_with_only_what_the_failure_needs() -> None:
    """Two of many events, wherever they are, and the smallest values of theirs that will do."""
    script = next(script for script in map(scenario, range(100)) if len(script.opens) >= 8)
    needed = script.opens[1].request, script.opens[6].request

    def fails(candidate: Script) -> bool:
        left = {event.request: event for event in candidate.events if isinstance(event, Open)}
        return all(request in left and left[request].prompt >= 1 for request in needed)

    short = shrink(script, fails)
    assert sorted(event.request for event in short.opens) == sorted(needed)
    assert len(short.events) == 2
    assert all(event.n == 1 and event.tokens == 1 and event.prompt == 1 for event in short.opens)
