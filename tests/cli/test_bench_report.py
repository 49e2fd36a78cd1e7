import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfllm_cli.bench_report import Sample, Summary, percentile, report


def test_the_figures_of_known_times_are_exact() -> None:
    figures = report(
        [
            Sample(
                sent_at=10.0, ended_at=12.0, arrivals=(10.5, 11.0, 12.0), prompt_tokens=7, output_tokens=4
            ),
            Sample(sent_at=11.0, ended_at=14.0, arrivals=(12.5, 14.0), prompt_tokens=3, output_tokens=2),
        ]
    )
    assert (figures.completed, figures.failed, figures.seconds) == (2, 0, 4.0)
    assert (figures.prompt_tokens, figures.output_tokens) == (10, 6)
    assert figures.requests_per_second == 0.5
    assert figures.output_tokens_per_second == 1.5
    assert figures.total_tokens_per_second == 4.0
    assert figures.ttft.mean == 1.0
    assert figures.itl.mean == pytest.approx((0.5 + 1.0 + 1.5) / 3)
    assert figures.tpot.mean == pytest.approx((1.5 / 3 + 1.5) / 2)
    assert figures.end_to_end.p50 == 2.5


def test_failed_requests_are_counted_and_their_times_left_out() -> None:
    figures = report(
        [
            Sample(sent_at=0.0, ended_at=1.0, arrivals=(0.5,), prompt_tokens=1, output_tokens=1),
            Sample(
                sent_at=0.0, ended_at=9.0, arrivals=(5.0,), prompt_tokens=9, output_tokens=9, error="lost"
            ),
        ]
    )
    assert (figures.completed, figures.failed, figures.errors) == (1, 1, {"lost": 1})
    assert figures.ttft.p99 == 0.5
    assert figures.output_tokens == 1


def test_an_answer_of_one_token_has_no_time_per_further_token() -> None:
    figures = report([Sample(sent_at=0.0, ended_at=1.0, arrivals=(0.5,), prompt_tokens=1, output_tokens=1)])
    assert math.isnan(figures.tpot.mean)
    assert json.loads(json.dumps(figures.to_json()))["tpot"]["p50"] is None


def test_no_requests_give_a_report_without_values() -> None:
    figures = report([])
    assert (figures.completed, figures.requests_per_second) == (0, 0.0)


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
