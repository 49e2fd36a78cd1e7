"""The figures of a benchmark, from known times."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfllm_cli.bench.figures import Figures, Sample, Summary, Targets, figures, median_figures, percentile

FAST = Sample(sent_at=0.0, ended_at=1.0, arrivals=(0.1, 0.2, 0.3), prompt_tokens=1, output_tokens=3)


def test_the_figures_of_known_times_are_exact() -> None:
    found = figures(
        [
            Sample(
                sent_at=10.0, ended_at=12.0, arrivals=(10.5, 11.0, 12.0), prompt_tokens=7, output_tokens=4
            ),
            Sample(sent_at=11.0, ended_at=14.0, arrivals=(12.5, 14.0), prompt_tokens=3, output_tokens=2),
        ]
    )
    assert (found.completed, found.failed, found.seconds) == (2, 0, 4.0)
    assert (found.prompt_tokens, found.output_tokens) == (10, 6)
    assert found.requests_per_second == found.good_requests_per_second == 0.5
    assert found.output_tokens_per_second == 1.5
    assert found.total_tokens_per_second == 4.0
    assert found.ttft.mean == 1.0
    assert found.itl.mean == pytest.approx((0.5 + 1.0 + 1.5) / 3)
    assert found.tpot.mean == pytest.approx((1.5 / 3 + 1.5) / 2)
    assert found.end_to_end.p50 == 2.5


def test_failed_requests_are_counted_and_their_times_left_out() -> None:
    found = figures(
        [
            Sample(sent_at=0.0, ended_at=1.0, arrivals=(0.5,), prompt_tokens=1, output_tokens=1),
            Sample(
                sent_at=0.0, ended_at=9.0, arrivals=(5.0,), prompt_tokens=9, output_tokens=9, error="lost"
            ),
        ]
    )
    assert (found.completed, found.failed, found.errors) == (1, 1, {"lost": 1})
    assert found.ttft.p99 == 0.5
    assert (found.output_tokens, found.good_share) == (1, 0.5)


def test_an_answer_of_one_token_has_no_time_per_further_token() -> None:
    found = figures([Sample(sent_at=0.0, ended_at=1.0, arrivals=(0.5,), prompt_tokens=1, output_tokens=1)])
    assert math.isnan(found.tpot.mean)
    assert json.loads(json.dumps(found.to_json()))["tpot"]["p50"] is None


def test_no_requests_give_figures_without_values() -> None:
    found = figures([])
    assert (found.completed, found.requests_per_second) == (0, 0.0)


@pytest.mark.parametrize(
    ("targets", "good"),
    [
        (Targets(), True),
        (Targets(ttft=0.1, itl=0.1), True),
        (Targets(ttft=0.09), False),
        (Targets(itl=0.09), False),
    ],
)
def test_an_answer_is_good_when_it_keeps_both_targets(targets: Targets, good: bool) -> None:
    assert figures([FAST], targets).good_share == good


def test_an_answer_without_output_keeps_no_target_for_its_first() -> None:
    empty = Sample(sent_at=0.0, ended_at=0.1)
    assert figures([empty], Targets(ttft=9.0)).good_share == 0
    assert figures([empty], Targets(ttft=9.0)).completed == 1


@given(
    st.lists(st.builds(Sample, st.just(0.0), st.floats(1, 9), st.tuples(st.floats(0, 1), st.floats(1, 2)))),
    st.floats(0, 2),
    st.floats(0, 2),
)
def test_stricter_targets_never_give_more_goodput(
    samples: list[Sample], target: float, stricter: float
) -> None:
    loose, strict = max(target, stricter), min(target, stricter)
    for name in ("ttft", "itl"):
        assert (
            figures(samples, Targets(**{name: strict})).good_share
            <= figures(samples, Targets(**{name: loose})).good_share
        )


def test_it_is_said_how_tokens_were_counted() -> None:
    counted = Sample(sent_at=0.0, ended_at=1.0)
    guessed = Sample(sent_at=0.0, ended_at=1.0, has_usage=False)
    assert figures([counted]).tokens_counted_by == "usage"
    assert figures([guessed]).tokens_counted_by == "chunks"
    assert figures([counted, guessed]).tokens_counted_by == "both"


def of_one(ended_at: float, error: str = "") -> Figures:
    return figures([Sample(sent_at=0.0, ended_at=ended_at, arrivals=(0.5,), output_tokens=1, error=error)])


def test_medians_over_rounds_are_taken_figure_by_figure() -> None:
    found = median_figures([of_one(1.0), of_one(4.0), of_one(2.0)])
    assert found.seconds == found.end_to_end.p99 == 2.0
    assert found.requests_per_second == 0.5
    assert math.isnan(found.tpot.mean)


def test_errors_of_all_rounds_are_added_up_and_their_missing_values_left_out() -> None:
    found = median_figures([of_one(1.0), of_one(3.0, "lost"), of_one(9.0, "lost")])
    assert found.errors == {"lost": 2}
    assert found.end_to_end.mean == 1.0


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=200))
def test_percentiles_agree_with_the_standard_library(values: list[float]) -> None:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    ordered = sorted(values)
    for rank in (50, 95, 99):
        assert percentile(ordered, rank) == pytest.approx(cuts[rank - 1], abs=1e-9)


@given(st.lists(st.floats(0, 1e3), min_size=1))
def test_a_summary_lies_between_the_smallest_and_the_largest_value(values: list[float]) -> None:
    summary = Summary.of(values)
    for value in (summary.mean, summary.p50, summary.p95, summary.p99):
        assert min(values) - 1e-9 <= value <= max(values) + 1e-9
    assert summary.p50 <= summary.p95 <= summary.p99
