"""The modelled engine through histories of requests that come, are computed and are taken away."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfllm.prefixes import CHUNK_TOKENS
from sfllm_cli.simulate.engine import ModelledEngine
from sfllm_cli.simulate.profiles import Profile
from sfllm_cli.simulate.work import Work

BLOCK = 16
KV_TOKENS = 12 * CHUNK_TOKENS
MOST_STEPS = 10_000


class Request(NamedTuple):
    """One request: whose beginning it has, and how long it is. It fits the cache alone."""

    family: int
    shared_chunks: int
    own_tokens: int
    outputs: int


class Move(NamedTuple):
    """`remove` takes away the request of that number; `step` completes this share of what is planned."""

    kind: str
    request: Request
    number: int
    share: float


REQUESTS = st.builds(Request, st.integers(1, 2), st.integers(0, 4), st.integers(1, 200), st.integers(1, 300))
KINDS = st.sampled_from(["add", "add", "step", "step", "step", "remove"])
MOVES = st.builds(Move, KINDS, REQUESTS, st.integers(0, 50), st.floats(0, 1))


def engine(*, shortest_first: bool, target: float | None = None) -> ModelledEngine:
    profile = Profile(
        source="a test",
        base_seconds=0.01,
        per_prefill_token=0.001,
        per_decode_row=0.002,
        per_context_token=0.00001,
        slots=5,
        kv_tokens=KV_TOKENS,
        step_tokens=100,
        block_size=BLOCK,
        target_itl_seconds=target,
    )
    made = ModelledEngine(profile)
    made.shortest_first = shortest_first
    return made


def work_of(number: int, request: Request) -> Work:
    prompt = request.shared_chunks * CHUNK_TOKENS + request.own_tokens
    names = [
        (request.family if chunk < request.shared_chunks else 1000 + number) << 16 | chunk
        for chunk in range((prompt + request.outputs) // CHUNK_TOKENS)
    ]
    return Work((0, number), 0, prompt, request.outputs, memoryview(array("Q", names)))


class History:
    """An engine, the requests that are on it, and who has got a first and a last token."""

    def __init__(self, made: ModelledEngine) -> None:
        self.engine = made
        self.seconds = 0.0
        self.here: dict[int, Work] = {}
        self.begun: dict[int, tuple[int, float]] = {}
        self.ended: dict[int, tuple[int, float]] = {}

    def add(self, request: Request) -> None:
        number = len(self.here) + len(self.ended) + 1000 * len(self.begun)
        while number in self.here or number in self.begun:
            number += 1
        self.here[number] = work_of(number, request)
        self.engine.add(self.here[number])

    def step(self, share: float) -> None:
        """Complete this share of what is planned, one step at least."""
        plan = self.engine.plan()
        if plan is None:
            assert not self.here
            return
        steps = 1 + int(share * (plan.steps - 1))
        self.seconds += plan.seconds if steps == plan.steps else self.engine.seconds(plan.rows, steps)
        first, finished = self.engine.complete(plan, steps)
        now = self.engine.steps, self.seconds
        for work in first:  # one that was preempted gets its first token once more
            self.begun.setdefault(work.key[1], now)
        for work in finished:
            number = work.key[1]
            assert number in self.begun
            assert number not in self.ended
            self.ended[number] = now
            del self.here[number]

    def finish(self, share: float) -> None:
        for _ in range(MOST_STEPS):
            if not self.here:
                return
            self.step(share)
        raise AssertionError("requests do not come to an end")


def check(history: History) -> None:
    made = history.engine
    made.check_integrity()
    assert {work.key[1] for work in made.works()} == set(history.here)
    assert made.running + made.waiting == len(history.here)
    cache = made.blocks.cache
    tokens = BLOCK * made.blocks.own + CHUNK_TOKENS * cache.used
    assert made.free_tokens == KV_TOKENS - tokens >= CHUNK_TOKENS * cache.idle
    assert made.pending_tokens >= 0


@pytest.mark.parametrize("shortest_first", [False, True])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(moves=st.lists(MOVES, max_size=40), target=st.sampled_from([None, 0.02, 0.1]))
def test_every_history_keeps_the_cache_in_order_and_comes_to_an_end(
    shortest_first: bool, moves: list[Move], target: float | None
) -> None:
    history = History(engine(shortest_first=shortest_first, target=target))
    for move in moves:
        if move.kind == "add":
            history.add(move.request)
        elif move.kind == "step":
            history.step(move.share)
        elif history.here:
            number = sorted(history.here)[move.number % len(history.here)]
            history.engine.remove(history.here.pop(number))
            assert history.engine.find((0, number)) is None
        check(history)
    history.finish(1.0)
    check(history)
    assert history.engine.plan() is None
    assert history.engine.free_tokens == KV_TOKENS


@pytest.mark.parametrize("shortest_first", [False, True])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=8), share=st.floats(0, 0.9))
def test_a_run_of_steps_that_is_cut_anywhere_gives_the_same_as_at_once(
    shortest_first: bool, requests: list[Request], share: float
) -> None:
    at_once = History(engine(shortest_first=shortest_first))
    in_parts = History(engine(shortest_first=shortest_first))
    for history, part in ((at_once, 1.0), (in_parts, share)):
        for request in requests:
            history.add(request)
        history.finish(part)
    for expected, got in ((at_once.begun, in_parts.begun), (at_once.ended, in_parts.ended)):
        assert list(got) == list(expected)
        assert [step for step, _ in got.values()] == [step for step, _ in expected.values()]
        assert [at for _, at in got.values()] == pytest.approx([at for _, at in expected.values()])
    assert in_parts.engine.preempted == at_once.engine.preempted
    assert in_parts.engine.hit_tokens == at_once.engine.hit_tokens


def test_what_another_prompt_computes_is_not_pending() -> None:
    """All of its whole chunks count as known, the last one too; what comes after them is its answer."""
    made = engine(shortest_first=False)
    leader = work_of(0, Request(1, 2, 0, 200))
    made.add(leader)
    plan = made.plan()
    assert plan is not None
    made.complete(plan, 1)
    made.add(work_of(1, Request(1, 3, 8, 10)))
    assert leader.left == 28
    assert made.pending_tokens == 28 + 64 + 8


def test_nobody_waits_for_an_answer_of_another() -> None:
    made = engine(shortest_first=False)
    leader, follower = (Work((0, number), 0, 120 + 60 * number, 50, (7, 8)) for number in range(2))
    made.add(leader)
    plan = made.plan()
    assert plan is not None
    made.complete(plan, 1)
    made.add(follower)  # its second chunk is partly what the leader will answer
    plan = made.plan()
    assert plan is not None
    assert plan.admitted == [follower]
    assert plan.chunks == [(leader, 20), (follower, 80)]
