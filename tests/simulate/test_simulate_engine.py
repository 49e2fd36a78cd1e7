"""The modelled engine against the real planner, and its own counts."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planners import Case, Model, Prompt, RealPlanner, profile

from sfllm.prefixes import CHUNK_TOKENS
from sfllm_cli.simulate.engine import ModelledEngine
from sfllm_cli.simulate.profiles import Profile
from sfllm_cli.simulate.work import Work

STEPS = 400

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
    block_size=st.just(CHUNK_TOKENS),
    per_context_token=st.just(0.0),
)


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
        if not real.has_work:
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
    assert model.preempted == real.preempted


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


def test_two_attempts_of_a_request_may_end_in_the_same_step() -> None:
    """The first was taken away, and is still among the ends that are looked at."""
    engine = lone()
    for _ in range(2):
        work = Work((0, 1), 0, 100, 20 - engine.steps)
        engine.add(work)
        plan = engine.plan()
        assert plan is not None
        engine.complete(plan, 1)
        if engine.steps == 1:
            engine.remove(work)
    ends = [each[0] for each in engine._ends]
    assert ends == [20, 20]
    while (plan := engine.plan()) is not None:
        engine.complete(plan, plan.steps)
    assert engine.free_tokens == 100 * CHUNK_TOKENS
