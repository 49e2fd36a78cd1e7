"""What an idempotency key makes of a request, and what one gateway remembers of it: without sockets."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfllm.errors import ErrorCode, ServiceError
from sfllm.messages import Sampling
from sfllm_gateway.generation import Generation
from sfllm_gateway.http_io import JSON_HEADERS
from sfllm_gateway.idempotency import Attempt, attempt_of
from sfllm_gateway.idempotency_store import ENTRY_BYTES, AnswerMemory, Kept, Recorder, Turns


def attempt(key: str = "k", tenant: str = "t", path: str = "/p", body: bytes = b"{}") -> Attempt:
    found = attempt_of(key, tenant, path, body)
    assert found is not None
    return found


def kept(size: int = 10) -> Kept:
    return Kept(200, JSON_HEADERS, b"x" * size)


def test_a_request_without_a_key_is_no_attempt() -> None:
    assert attempt_of(None, "t", "/p", b"{}") is None


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "é", "\x7f"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(ServiceError) as caught:
        attempt_of(key, "t", "/p", b"{}")
    assert (caught.value.code, caught.value.param) == (ErrorCode.INVALID_REQUEST, "Idempotency-Key")


def test_the_longest_key_and_one_with_spaces_are_taken() -> None:
    assert attempt("x" * 255) != attempt("a b")


def test_seeds_and_names_follow_from_tenant_key_path_and_body_and_from_nothing_else() -> None:
    first = attempt()
    assert (first.name, first.seed(0)) == (attempt().name, attempt().seed(0))
    others = [attempt(key="l"), attempt(tenant="u"), attempt(path="/q"), attempt(body=b"{ }")]
    # Nor do parts of one become parts of the next.
    others += [attempt(key="tk", tenant=""), attempt(path="/p{", body=b"}")]
    assert len({each.name for each in [first, *others]}) == 7
    assert len({each.seed(0) for each in [first, *others]}) == 7
    assert first.seed(0) != first.seed(1)
    assert all(0 <= each.seed(number) < 2**63 for each in others for number in range(9))


def generation(seeded: bool) -> Generation:
    model = cast("Any", SimpleNamespace())
    samplings = [Sampling(max_tokens=1, seed=5), Sampling(max_tokens=2, seed=6)]
    return Generation(model, [array("I", [1])] * 2, 1, samplings, seeded=seeded)


def test_seeds_that_the_client_left_open_are_those_of_the_attempt() -> None:
    first = attempt()
    found = first.seeded(generation(seeded=False)).samplings
    assert [sampling.seed for sampling in found] == [first.seed(0), first.seed(1)]
    assert [sampling.max_tokens for sampling in found] == [1, 2]
    chosen = first.seeded(generation(seeded=True)).samplings
    assert [sampling.seed for sampling in chosen] == [5, 6]


def test_an_answer_is_found_until_its_time_is_over() -> None:
    memory = AnswerMemory(10_000, 60)
    memory.keep(attempt(), kept(), 100)
    assert memory.find(attempt(), 159) == kept()
    assert memory.find(attempt(), 160) is None
    assert memory.size == 0


def test_a_key_with_another_body_is_refused_even_where_only_a_stream_was_answered() -> None:
    memory = AnswerMemory(10_000, 60)
    memory.keep(attempt(), None, 0)
    assert memory.find(attempt(), 1) is None
    with pytest.raises(ServiceError) as caught:
        memory.find(attempt(body=b"[]"), 1)
    assert caught.value.code is ErrorCode.IDEMPOTENCY_KEY_REUSED
    assert memory.find(attempt(body=b"[]"), 61) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4000), st.integers(0, 40)), max_size=40))
def test_answers_never_take_more_room_than_there_is_and_the_newest_stay(
    steps: list[tuple[int, int, int]],
) -> None:
    limit = 3 * ENTRY_BYTES + 1000
    memory, now = AnswerMemory(limit, 60), 0
    for key, size, seconds in steps:
        now += seconds
        memory.keep(attempt(str(key)), kept(size), now)
        assert 0 <= memory.size <= limit
        found = memory.find(attempt(str(key)), now)
        assert found == (kept(size) if ENTRY_BYTES + size <= limit else None)


@dataclass
class Log:
    """Who was served, in order."""

    served: list[int]


async def serve(turns: Turns, log: Log, number: int, gate: asyncio.Event, fails: bool = False) -> Kept:
    """As a gateway serves an attempt."""
    found = await turns.wait(attempt())
    if found is not None:
        return found
    async with turns.take(attempt()):
        log.served.append(number)
        await gate.wait()
        if fails:
            raise ServiceError(ErrorCode.ENGINE_FAILURE, "no")
        answer = Kept(200, (), b"%d" % number)
        turns.keep(attempt(), answer)
        return answer


async def started(turns: Turns, log: Log, gate: asyncio.Event, fails: bool, others: int) -> list[Any]:
    """The first attempt, being served, and others that wait for it."""
    tasks = [asyncio.ensure_future(serve(turns, log, 0, gate, fails))]
    tasks += [asyncio.ensure_future(serve(turns, log, number, gate)) for number in range(1, others + 1)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert log.served == [0]
    return tasks


async def test_those_that_come_meanwhile_get_the_first_ones_answer() -> None:
    turns, log, gate = Turns(AnswerMemory(10_000, 60)), Log([]), asyncio.Event()
    tasks = await started(turns, log, gate, fails=False, others=3)
    gate.set()
    assert {(await task).body for task in tasks} == {b"0"}
    assert log.served == [0]


async def test_where_the_first_fails_one_of_the_others_is_served_for_all() -> None:
    turns, log, gate = Turns(AnswerMemory(10_000, 60)), Log([]), asyncio.Event()
    tasks = await started(turns, log, gate, fails=True, others=3)
    gate.set()
    with pytest.raises(ServiceError):
        await tasks[0]
    assert {(await task).body for task in tasks[1:]} == {b"1"}
    assert log.served == [0, 1]


async def test_one_that_gives_up_waiting_leaves_the_others_alone() -> None:
    turns, log, gate = Turns(AnswerMemory(10_000, 60)), Log([]), asyncio.Event()
    tasks = await started(turns, log, gate, fails=False, others=2)
    tasks[1].cancel()
    gate.set()
    assert (await tasks[2]).body == b"0"
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]


async def test_without_room_for_answers_each_attempt_is_served_one_at_a_time() -> None:
    turns, log, gate = Turns(AnswerMemory(0, 60)), Log([]), asyncio.Event()
    tasks = await started(turns, log, gate, fails=False, others=2)
    gate.set()
    assert [(await task).body for task in tasks] == [b"0", b"1", b"2"]


async def test_another_body_does_not_wait_for_the_first_one() -> None:
    turns, log, gate = Turns(AnswerMemory(10_000, 60)), Log([]), asyncio.Event()
    tasks = await started(turns, log, gate, fails=False, others=0)
    with pytest.raises(ServiceError):
        await turns.wait(attempt(body=b"other"))
    gate.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [
        (200, b"application/json", b"body"),
        (200, b"text/event-stream; charset=utf-8", None),
        (503, b"application/json", None),
    ],
)
async def test_only_whole_good_answers_are_kept(status: int, kind: bytes, expected: bytes | None) -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    recorder = Recorder(send)
    start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}
    await recorder(start)
    await recorder({"type": "http.response.body", "body": b"body"})
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert (None if recorder.kept is None else recorder.kept.body) == expected
