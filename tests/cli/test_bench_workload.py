"""The load of a benchmark: traces, times, sizes and prompts."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfllm_cli.bench.trace import Entry, TraceError, chat_trace, parse_trace, poisson_times, rescaled
from sfllm_cli.bench.workload import Point, Shape, bodies, parse_span, points, shapes
from sfllm_cli.bench_settings import BenchSettings

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""

entries = st.lists(
    st.builds(Entry, st.floats(0, 1e6), st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1
)


def test_the_columns_of_azure_are_known() -> None:
    first, second = parse_trace(AZURE)
    assert first == Entry(0.0, 374, 44)
    assert second.at == pytest.approx(4.314579, abs=1e-5)
    assert second[1:] == (396, 109)


@given(entries)
def test_a_trace_that_was_written_is_read_in_order_of_time(written: list[Entry]) -> None:
    lines = "\n".join(f"{entry.output_tokens},x,{entry.at!r},{entry.prompt_tokens}" for entry in written)
    read = parse_trace("output_tokens,model,time,prompt_tokens\n" + lines)
    start = min(entry.at for entry in written)
    assert read == [entry._replace(at=entry.at - start) for entry in sorted(written)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("time,prompt_tokens,output_tokens\n", "no request after the first line"),
        ("when,prompt_tokens,output_tokens\n1,2,3\n", "line 1: no column 'time' among when, prompt_tokens"),
        ("time,prompt_tokens,output_tokens\n1,2\n", "line 2: 2 values, expected at least 3"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n1,-2,3\n", "line 3: '-2' is no number of tokens"),
        ("time,prompt_tokens,output_tokens\n1,2,0\n", "line 2: '0' is no number of tokens"),
        ("time,prompt_tokens,output_tokens\nsoon,2,3\n", "line 2: 'soon' is no time"),
        ("time,prompt_tokens,output_tokens\nnan,2,3\n", "line 2: 'nan' is no time"),
        ("time,prompt_tokens,output_tokens\n1e400,2,3\n", "line 2: '1e400' is no time"),
        ('time,prompt_tokens,output_tokens\n1,"2\n', "line 2: "),
    ],
)
def test_a_bad_line_of_a_trace_is_named(text: str, message: str) -> None:
    with pytest.raises(TraceError) as error:
        parse_trace(text)
    assert message in str(error.value)


@given(st.text())
def test_any_text_is_a_trace_or_a_trace_error(text: str) -> None:
    for start in ("", "time,prompt_tokens,output_tokens\n"):
        try:
            read = parse_trace(start + text)
        except TraceError:
            continue
        assert all(entry.at >= 0 and entry.prompt_tokens > 0 for entry in read)


def test_the_made_up_trace_is_like_chat_traffic() -> None:
    trace = chat_trace(4000, random.Random(1))
    assert trace == sorted(trace, key=lambda entry: entry.at)
    assert trace[-1].at == pytest.approx(4000, rel=0.1)
    prompts = sorted(entry.prompt_tokens for entry in trace)
    assert 180 <= prompts[2000] <= 220
    assert prompts[-1] > 8 * prompts[2000], "a few prompts are long"


@given(st.floats(0.01, 1e4), st.integers(1, 200), st.integers())
def test_poisson_times_start_at_zero_and_never_go_back(rate: float, count: int, seed: int) -> None:
    times = poisson_times(rate, count, random.Random(seed))
    assert (len(times), times[0]) == (count, 0.0)
    assert times == sorted(times)


def test_poisson_times_have_the_gaps_of_their_distribution() -> None:
    times = poisson_times(5.0, 20001, random.Random(3))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.2, rel=0.03)
    assert spread == pytest.approx(0.2, rel=0.05)


def test_an_infinite_rate_means_all_at_once() -> None:
    assert poisson_times(math.inf, 3, random.Random(0)) == [0.0, 0.0, 0.0]
    assert rescaled([0.0, 1.0, 7.0], math.inf) == [0.0, 0.0, 0.0]


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1e4))
def test_rescaled_times_have_the_rate_and_keep_their_proportions(gaps: list[float], rate: float) -> None:
    times = [0.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    stretched = rescaled(times, rate)
    if times[-1] == 0:
        assert stretched == times
    else:
        assert stretched[-1] == pytest.approx((len(times) - 1) / rate)
        assert stretched[1] / stretched[-1] == pytest.approx(times[1] / times[-1])


def test_the_same_seed_gives_the_same_load() -> None:
    settings = BenchSettings(prompt_tokens="16:512", output_tokens="1:9", seed=7, request_rate=(3.0,))
    point = Point(rate=3.0)
    load = shapes(settings, point, 50, None)
    assert load == shapes(settings, point, 50, None)
    assert all(16 <= shape.prompt_tokens <= 512 and 1 <= shape.output_tokens <= 9 for shape in load)
    other = shapes(BenchSettings(prompt_tokens="16:512", seed=8), point, 50, None)
    assert load != other


def test_a_sweep_over_rates_keeps_the_sizes() -> None:
    settings = BenchSettings(prompt_tokens="16:512", request_rate=(1.0, 2.0))
    slow, fast = (shapes(settings, point, 20, None) for point in points(settings))
    assert [shape._replace(at=0.0) for shape in slow] == [shape._replace(at=0.0) for shape in fast]
    assert slow[-1].at == pytest.approx(2 * fast[-1].at)


def test_a_rate_changes_the_times_of_a_trace_and_not_its_sizes() -> None:
    trace = [Entry(0.0, 5, 6), Entry(3.0, 7, 8), Entry(4.0, 9, 10)]
    load = shapes(BenchSettings(), Point(rate=1.0), 2, trace)
    assert [(shape.at, shape.prompt_tokens, shape.output_tokens) for shape in load] == [(0, 5, 6), (1, 7, 8)]
    as_recorded = shapes(BenchSettings(), Point(), 9, trace)
    assert [shape.at for shape in as_recorded] == [0.0, 3.0, 4.0]


@pytest.mark.parametrize("token_ids", [True, False])
def test_prompts_of_another_salt_share_no_beginning(token_ids: bool) -> None:
    load = [Shape(0.0, 20, 3, 0)] * 4

    def prompts(salt: str) -> list[list[object]]:
        encoded = bodies(BenchSettings(prefix_tokens=30), "m", load, token_ids=token_ids, salt=salt)
        found = [json.loads(body)["prompt"] for body in encoded]
        return [prompt if token_ids else prompt.split() for prompt in found]

    first, again, other = prompts("a"), prompts("a"), prompts("b")
    assert first == again
    assert {len(prompt) for prompt in first + other} == {50}
    assert first[0][:30] == first[3][:30] != other[0][:30]


@pytest.mark.parametrize("text", ["0", "9:3", "0:4"])
def test_a_span_without_tokens_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number of tokens"):
        parse_span(text)
