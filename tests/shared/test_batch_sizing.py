from hypothesis import example, given
from hypothesis import strategies as st

from sfllm.batch_sizing import LEAST_PREFILL_TOKENS, TOLERANCE, BatchSizing
from sfllm.step_curve import StepCurve

CURVE = StepCurve(0.005, 0.0001, 0.0005, 1e-6)
PART_OF_A_TOKEN = CURVE.per_context_token
"""Curves take whole tokens, where sizes come from mean contexts that are not whole."""


@given(st.floats(0.006, 1.0), st.integers(1, 512), st.floats(1, 4000))
@example(target=0.8125, most=224, context=3558.0)
def test_so_many_sequences_as_fit_and_hardly_one_more_keep_the_target(
    target: float, most: int, context: float
) -> None:
    sizing = BatchSizing(target, most)
    sizing.follow(CURVE, context)
    rows = sizing.sequences
    assert 1 <= rows <= most
    fewer = int(rows * (1 - TOLERANCE))
    assert fewer < 2 or CURVE.seconds(0, fewer, round(fewer * context)) <= target + PART_OF_A_TOKEN
    more = int(rows * (1 + TOLERANCE)) + 2
    assert rows == most or CURVE.seconds(0, more, round(more * context)) > target


@given(st.floats(0.006, 1.0), st.integers(1, 4096), st.integers(0, 512), st.integers(0, 100_000))
def test_a_mixed_step_keeps_the_target_or_takes_in_the_least_that_gets_on(
    target: float, most: int, rows: int, context: int
) -> None:
    sizing = BatchSizing(target, 512)
    sizing.follow(CURVE, 1000.0)
    tokens = sizing.prefill_tokens(most, rows, context)
    assert 1 <= tokens <= most
    if not rows:
        assert tokens == most, "without decodes nobody waits"
    elif tokens > LEAST_PREFILL_TOKENS:
        assert CURVE.seconds(tokens, rows, context) <= target + 1e-9


def test_nothing_is_held_back_before_steps_were_measured() -> None:
    sizing = BatchSizing(0.001, 64)
    assert sizing.sequences == 64
    assert sizing.prefill_tokens(512, 40, 10_000) == 512


def test_small_differences_between_measurements_change_nothing() -> None:
    sizing = BatchSizing(0.03, 512)
    sizing.follow(CURVE, 500.0)
    before = sizing.sequences
    for factor in (1.02, 0.98, 1.05, 0.97):
        sizing.follow(StepCurve(*(part * factor for part in CURVE)), 500.0)
        assert sizing.sequences == before
    sizing.follow(StepCurve(*(part * 2 for part in CURVE)), 500.0)
    assert sizing.sequences < before


parts = st.floats(0.0, 0.1)


@given(st.builds(StepCurve, parts, parts, parts, parts), st.floats(1e-4, 1.0), st.integers(1, 512))
def test_whatever_the_curve_a_worker_takes_someone_and_no_more_than_it_can(
    curve: StepCurve, target: float, most: int
) -> None:
    sizing = BatchSizing(target, most)
    sizing.follow(curve, 1000.0)
    assert 1 <= sizing.sequences <= most
    assert min(most, LEAST_PREFILL_TOKENS) <= sizing.prefill_tokens(most, 8, 8000) <= most


def test_a_part_that_takes_no_time_is_not_bounded_even_where_the_target_cannot_be_kept() -> None:
    sizing = BatchSizing(0.001, 64)
    sizing.follow(StepCurve(0.01, 0.0, 0.0, 0.0), 1000.0)
    assert sizing.sequences == 64
    assert sizing.prefill_tokens(512, 8, 8000) == 512


def test_a_worker_that_becomes_faster_takes_all_again() -> None:
    sizing = BatchSizing(0.03, 512)
    sizing.follow(CURVE, 500.0)
    assert sizing.sequences < 512
    sizing.follow(CURVE._replace(per_decode_row=1e-6, per_context_token=0.0), 500.0)
    assert sizing.sequences == 512
