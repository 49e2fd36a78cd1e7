"""Order and size of prefill change when tokens come, never which; what is left of it is always known."""

from itertools import pairwise

from fake_device import FakeDevice
from fake_model import LIMITS
from hypothesis import given, settings
from hypothesis import strategies as st
from overlap import END_OF_TEXT, Output, finish, overlapped_engine, plain_engine, sequence
from protocol_driver import Driver, joined

from sfllm.messages import WorkerProgress
from sfllm.step_curve import StepCurve
from sfllm_worker.engine.engine import Engine

CURVE = StepCurve(0.002, 0.001, 0.001, 0.0)

arrivals = st.lists(
    st.tuples(st.lists(st.integers(0, 47), min_size=1, max_size=30), st.integers(0, 3)),
    min_size=1,
    max_size=8,
)


def played(engine: Engine, prompts: list[tuple[list[int], int]]) -> Output:
    """Sequences come some steps after one another, and run to their ends."""
    output = Output()
    for key, (tokens, steps) in enumerate(prompts):
        engine.add(sequence(key, tokens))
        for _ in range(steps):
            output.take(engine.step())
            engine.check_integrity()
    return finish(engine, output)


@settings(max_examples=40, deadline=None)
@given(arrivals, st.booleans(), st.booleans())
def test_the_order_of_prefill_and_a_target_change_no_token(
    prompts: list[tuple[list[int], int]], shortest_first: bool, with_target: bool
) -> None:
    engine = overlapped_engine(FakeDevice())
    engine.shortest_first = shortest_first
    if with_target:
        engine.keep_within(0.004)
        assert engine.planner.sizing is not None
        engine.planner.sizing.follow(CURVE, 20.0)
        assert engine.slots == 2
    found, wanted = played(engine, prompts), played(plain_engine(), prompts)
    assert (found.tokens, found.ends) == (wanted.tokens, wanted.ends)


def test_what_a_launched_step_takes_in_is_not_left_any_more() -> None:
    engine = overlapped_engine(FakeDevice())
    budget = LIMITS.max_step_tokens
    engine.add(sequence("r", [*range(2 * budget + 3)]))
    assert engine.pending_prefill_tokens == budget, "of a single one a step's worth at most"
    engine.step()
    assert engine.pending_prefill_tokens == 3, "one step was read, another is in flight"
    finish(engine)
    assert engine.pending_prefill_tokens == 0


@settings(max_examples=40, deadline=None)
@given(arrivals, st.booleans())
def test_an_engine_that_launches_ahead_says_in_the_end_that_nothing_is_left(
    prompts: list[tuple[list[int], int]], shortest_first: bool
) -> None:
    engine = overlapped_engine(FakeDevice())
    driver: Driver = joined(engine)
    engine.shortest_first = shortest_first
    for handle, (tokens, steps) in enumerate(prompts, 1):
        driver.grant(handle, prompt=tuple(tokens), temperature=0.0, stop_token_ids=END_OF_TEXT)
        driver.step(steps)
    driver.run()
    said = driver.messages(WorkerProgress)
    assert (said[-1].grants, said[-1].pending_tokens) == (len(prompts), 0)
    assert all(one != after for one, after in pairwise(said)), "only what has changed"
    assert driver.all_free()
