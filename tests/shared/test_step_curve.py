import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfllm.step_curve import LEAST_STEPS, StepCurve, StepCurveFit

TRUTH = StepCurve(0.008, 0.0003, 0.0005, 4e-7)


def step(source: random.Random) -> tuple[int, int, int]:
    rows = source.randrange(0, 64)
    return source.choice((0, 0, 16, 300, 512)), rows, sum(source.randrange(1, 2000) for _ in range(rows))


def test_a_curve_is_found_again_from_noisy_steps() -> None:
    source, fit = random.Random(1), StepCurveFit()
    for _ in range(1000):
        load = step(source)
        fit.add(*load, TRUTH.seconds(*load) * source.uniform(0.95, 1.05))
    found = fit.curve()
    assert found is not None
    for load in ((0, 1, 100), (512, 0, 0), (256, 30, 20_000), (0, 60, 60_000)):
        assert found.seconds(*load) == pytest.approx(TRUTH.seconds(*load), rel=0.03)


def test_it_follows_a_machine_that_has_become_slow() -> None:
    source, fit = random.Random(2), StepCurveFit()
    for factor in (1.0, 3.0):
        for _ in range(3000):
            load = step(source)
            fit.add(*load, TRUTH.seconds(*load) * factor)
    found = fit.curve()
    assert found is not None
    assert found.seconds(512, 0, 0) == pytest.approx(3 * TRUTH.seconds(512, 0, 0), rel=0.05)


def test_steps_of_one_kind_are_told_right_though_their_parts_are_not_known() -> None:
    fit = StepCurveFit()
    for _ in range(50):
        fit.add(0, 8, 8 * 256, 0.02)
    found = fit.curve()
    assert found is not None
    assert found.seconds(0, 8, 8 * 256) == pytest.approx(0.02)


def test_too_few_steps_tell_nothing() -> None:
    fit = StepCurveFit()
    for _ in range(LEAST_STEPS - 1):
        fit.add(0, 1, 10, 0.01)
    assert fit.curve() is None


@given(
    st.lists(
        st.tuples(st.integers(0, 4096), st.integers(0, 512), st.integers(0, 10**7), st.floats(1e-6, 100.0)),
        min_size=LEAST_STEPS,
        max_size=60,
    )
)
def test_no_part_of_a_fit_is_ever_negative_or_infinite(steps: list[tuple[int, int, int, float]]) -> None:
    fit = StepCurveFit()
    for measured in steps:
        fit.add(*measured)
    found = fit.curve()
    assert found is not None
    assert all(0.0 <= part < 1e6 for part in found)
