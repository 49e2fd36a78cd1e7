"""The modelled engine against the real planner, and its own counts."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sfllm.batch_sizing import BatchSizing
from sfllm.messages import Sampling
from sfllm.prefixes import CHUNK_TOKENS
from sfllm_cli.simulate.engine import ModelledEngine
from sfllm_cli.simulate.profiles import Profile
from sfllm_cli.simulate.work import Work
from sfllm_worker.engine.planner import Limits, Planner
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.kv.block_pool import BlockPool

STEPS = 400


class Prompt(NamedTuple):
    """A request: when it comes (a number of steps), whose beginning it has, and how long it is."""

    at: int
    family: int
    shared_chunks: int
    own_tokens: int
    outputs: int


class Case(NamedTuple):
    prompts: list[Prompt]
    blocks: int
    slots: int
    step_tokens: int
    shortest_first: bool
    target: float | None


PROMPTS = st.builds(
    Prompt,
    at=st.integers(0, 20),
    family=st.integers(0, 1),
    shared_chunks=st.integers(0, 3),
    own_tokens=st.integers(2, 200),
    outputs=st.integers(1, 150),
)
CASES = st.builds(
    Case,
    prompts=st.lists(PROMPTS, min_size=1, max_size=8),
    blocks=st.integers(9, 20),
    slots=st.integers(1, 6),
    step_tokens=st.integers(16, 300),
    shortest_first=st.booleans(),
    target=st.sampled_from([None, 0.03, 0.2]),
)


def profile(case: Case) -> Profile:
    return Profile(
        source="a test",
        base_seconds=0.01,
        per_prefill_token=0.001,
        per_decode_row=0.002,
        per_context_token=0.0,
        slots=case.slots,
        kv_tokens=case.blocks * CHUNK_TOKENS,
        step_tokens=case.step_tokens,
        block_size=CHUNK_TOKENS,
        target_itl_seconds=case.target,
    )


def token(prompt: Prompt, number: int, position: int) -> int:
    """Token ids: equal where prompts begin alike, and nowhere else."""
    if position < prompt.shared_chunks * CHUNK_TOKENS:
        return 1 + prompt.family * 10_000 + position
    return 1_000_000 * (number + 1) + position


class RealPlanner:
    """The real planner, one step after the other, each read before the next is planned."""

    def __init__(self, case: Case) -> None:
        limits = Limits(case.slots, case.step_tokens, CHUNK_TOKENS)
        self.planner = Planner(limits, BlockPool(case.blocks + 1))
        self.planner.shortest_first = case.shortest_first
        self.case = case
        self.preempted = 0
        self._sequences: dict[Sequence, int] = {}
        if case.target is not None:
            self.planner.sizing = BatchSizing(case.target, case.slots)
            self.planner.sizing.follow(profile(case).curve, 0.0)

    def add(self, number: int) -> None:
        prompt = self.case.prompts[number]
        count = prompt.shared_chunks * CHUNK_TOKENS + prompt.own_tokens
        tokens = [token(prompt, number, position) for position in range(count)]
        sequence = Sequence(number, 0, tokens, count, Sampling(prompt.outputs, 0))
        self._sequences[sequence] = number
        self.planner.add(sequence)

    def step(self) -> tuple[set[int], dict[int, int], set[int]]:
        """Who decoded, how much of whose prompt was computed, and who ended."""
        plan = self.planner.plan()
        self.preempted += len(plan.preempted)
        rows = {sequence: count for sequence, count, _, _ in plan.rows if sequence not in plan.preempted}
        decoded = {
            self._sequences[each] for each in rows if each.remaining == 1 and each not in plan.admitted
        }
        chunks = {self._sequences[each]: count for each, count in rows.items()}
        self.planner.launch(plan)
        self.planner.settle(plan)
        ended = set()
        for sequence, _, _, completes in plan.rows:
            if completes:
                number = self._sequences[sequence]
                sequence.tokens.append(token(self.case.prompts[number], number, len(sequence.tokens)))
                if sequence.generated == self.case.prompts[number].outputs:
                    self.planner.remove(sequence)
                    ended.add(number)
        return decoded, {number: count for number, count in chunks.items() if number not in decoded}, ended


class Model:
    """The modelled engine; a run of equal steps is seen one step at a time."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.engine = ModelledEngine(profile(case))
        self.engine.shortest_first = case.shortest_first
        if self.engine.sizing is not None:
            self.engine.sizing.follow(profile(case).curve, 0.0)

    def add(self, number: int) -> None:
        prompt = self.case.prompts[number]
        count = prompt.shared_chunks * CHUNK_TOKENS + prompt.own_tokens
        names = array(
            "Q",
            [
                token(prompt, number, (chunk + 1) * CHUNK_TOKENS - 1)
                for chunk in range((count + prompt.outputs) // CHUNK_TOKENS)
            ],
        )
        self.engine.add(Work((0, number), 0, count, prompt.outputs, memoryview(names)))

    def has_single_tokens(self) -> bool:
        """Whether one token of a prompt is left to compute."""
        return any(work.begun and work.ends_at < 0 and work.left == 1 for work in self.engine.works())

    def step(self) -> tuple[set[int], dict[int, int], set[int]]:
        plan = self.engine.plan()
        if plan is None:
            return set(), {}, set()
        decoded = {work.key[1] for work in self.engine.works() if work.ends_at >= 0}
        assert len(decoded) == plan.rows
        _, finished = self.engine.complete(plan, 1)
        self.engine.check_integrity()
        chunks = {work.key[1]: count for work, count in plan.chunks}
        return decoded, chunks, {work.key[1] for work in finished}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(CASES)
def test_every_step_is_the_one_that_the_real_planner_takes(case: Case) -> None:
    prompts = case.prompts
    assume(
        all(each.shared_chunks * 64 + each.own_tokens + each.outputs <= 64 * case.blocks for each in prompts)
    )
    assume(case.step_tokens >= case.slots)
    real, model = RealPlanner(case), Model(case)
    left = set(range(len(prompts)))
    for step in range(STEPS * len(prompts)):
        for number, prompt in enumerate(prompts):
            if prompt.at == step:
                real.add(number)
                model.add(number)
        if step > 20 and not left:
            break
        if not real.planner.has_work:
            assert model.step() == (set(), {}, set())
            continue
        # A prompt of which one token is left counts as a decode there and as prefill here.
        assume(not model.has_single_tokens())
        assert model.engine.pending_tokens == real.planner.pending_tokens
        expected = real.step()
        assert model.step() == expected, f"step {step}"
        assert model.engine.free_tokens == real.planner.pool.num_free * CHUNK_TOKENS
        left -= expected[2]
    assert not left
    assert model.engine.preempted == real.preempted


def lone(blocks: int = 100, slots: int = 8) -> ModelledEngine:
    return ModelledEngine(profile(Case([], blocks, slots, 256, False, None)))


def test_a_run_of_decode_steps_is_as_good_as_each_of_them() -> None:
    engines = lone(), lone()
    for engine in engines:
        for number, (prompt, outputs) in enumerate([(100, 70), (30, 200), (500, 130)]):
            engine.add(Work((0, number), 0, prompt, outputs))
    ends: list[list[tuple[int, int]]] = [[], []]
    at_once, one_by_one = engines
    while (plan := at_once.plan()) is not None:
        _, finished = at_once.complete(plan, plan.steps)
        ends[0] += [(at_once.steps, work.key[1]) for work in finished]
    while (plan := one_by_one.plan()) is not None:
        _, finished = one_by_one.complete(plan, 1)
        ends[1] += [(one_by_one.steps, work.key[1]) for work in finished]
    assert ends[0] == ends[1]
    assert at_once.blocks.own == 0


def test_the_seconds_of_a_run_are_those_of_its_steps() -> None:
    sloping = Profile(
        source="a test",
        base_seconds=0.01,
        per_prefill_token=0.0,
        per_decode_row=0.001,
        per_context_token=0.0001,
        slots=4,
        kv_tokens=64_000,
        step_tokens=512,
    )
    engine = ModelledEngine(sloping)
    for number in range(3):
        engine.add(Work((0, number), 0, 100, 50))
    plan = engine.plan()
    assert plan is not None
    engine.complete(plan, 1)
    run = engine.plan()
    assert run is not None
    total = 0.0
    for _ in range(run.steps):
        step = engine.plan()
        assert step is not None
        total += engine.seconds(step.rows, 1)
        engine.complete(step, 1)
    assert run.seconds == pytest.approx(total)


def test_a_removed_request_leaves_nothing_behind() -> None:
    engine = lone()
    works = [Work((0, number), 0, 100, 20) for number in range(4)]
    for work in works:
        engine.add(work)
    plan = engine.plan()
    assert plan is not None
    engine.complete(plan, 1)
    for work in works:
        engine.remove(work)
        engine.check_integrity()
    assert engine.plan() is None
    assert engine.free_tokens == 100 * CHUNK_TOKENS
