"""Who asks for what, and when."""

from __future__ import annotations

import random
import statistics
from itertools import islice

import pytest

from sfllm.prefixes import CHUNK_TOKENS, MAX_PREFIXES
from sfllm_cli.bench.trace import Entry
from sfllm_cli.simulate.workload import (
    CHAT_SYSTEM_TOKENS,
    MIXES,
    bursts,
    conversation,
    of_chats,
    of_mix,
    of_trace,
    own_names,
    poisson,
    shared_out,
    two_sizes,
)


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_repeats_itself_with_the_same_seed(name: str) -> None:
    def lengths(seed: int) -> list[tuple[int, int]]:
        source = random.Random(seed)
        return [MIXES[name](source) for _ in range(50)]

    assert lengths(1) == lengths(1)
    assert (lengths(1) == lengths(2)) == (name == "equal")


def test_conversation_has_the_quantiles_of_the_published_trace() -> None:
    source = random.Random(0)
    drawn = [conversation(source) for _ in range(20_000)]
    prompts, outputs = sorted(p for p, _ in drawn), sorted(o for _, o in drawn)
    assert statistics.mean(prompts) == pytest.approx(1155, rel=0.03)
    assert statistics.mean(outputs) == pytest.approx(211, rel=0.03)
    assert prompts[10_000] == pytest.approx(1020, rel=0.03)
    assert outputs[10_000] == pytest.approx(129, rel=0.05)
    assert prompts[19_000] == pytest.approx(4083, rel=0.03)
    assert prompts[0] >= 2
    assert prompts[-1] <= 14_050


def test_two_sizes_are_four_to_one() -> None:
    source = random.Random(0)
    prompts = [two_sizes(source)[0] for _ in range(10_000)]
    assert set(prompts) == {64, 4096}
    assert prompts.count(64) / len(prompts) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("process", [poisson, bursts])
def test_arrivals_ascend_at_the_rate_that_is_wanted(process: object) -> None:
    assert callable(process)
    times = list(process(10.0, 20_000, random.Random(0)))
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(10.0, rel=0.05)


def test_bursts_leave_most_of_the_time_empty() -> None:
    seconds = {int(at) for at in bursts(50.0, 20_000, random.Random(0))}
    assert len(seconds) / max(seconds) == pytest.approx(0.2, abs=0.02)


def test_requests_of_a_mix_begin_like_no_other() -> None:
    asked = list(of_mix(conversation, poisson(1.0, 200, random.Random(0)), random.Random(1)))
    names = [name for each in asked for name in each.names]
    assert len(names) == len(set(names))
    assert all(
        len(each.prompt_names) == min((each.prompt_tokens - 1) // CHUNK_TOKENS, MAX_PREFIXES)
        for each in asked
    )


def test_a_chat_goes_on_with_all_that_was_said() -> None:
    asked = list(of_chats(5.0, 3000, random.Random(0)))
    by_end = {}
    continued = 0
    for each in asked:
        names = list(each.names)
        # The name of the last whole chunk of prompt and answer stands for all before it.
        previous = max((end for end in by_end if end in names), default=None)
        if previous is not None:
            continued += 1
            before = by_end[previous]
            assert names[: len(before)] == before
            assert each.prompt_tokens // CHUNK_TOKENS >= len(before)
        if len(names) * CHUNK_TOKENS > max(CHAT_SYSTEM_TOKENS) + CHUNK_TOKENS:
            by_end[names[-1]] = names
    assert continued > 500


def test_chats_share_system_prompts() -> None:
    asked = list(islice(of_chats(5.0, 1000, random.Random(0)), 1000))
    firsts = {each.names[0] for each in asked}
    assert 32 < len(firsts) <= 64


def test_a_trace_is_repeated_and_stretched_to_the_rate() -> None:
    entries = [Entry(0.0, 10, 5), Entry(1.0, 20, 6), Entry(4.0, 30, 7)]
    asked = list(of_trace(entries, 2.0, 300))
    assert [(each.prompt_tokens, each.output_tokens) for each in asked[:4]] == [
        (10, 5),
        (20, 6),
        (30, 7),
        (10, 5),
    ]
    times = [each.at for each in asked]
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(2.0, rel=0.02)
    assert (times[2] - times[1]) == pytest.approx(3 * (times[1] - times[0]))


def test_tenants_send_their_shares() -> None:
    asked = of_mix(two_sizes, poisson(1.0, 4000, random.Random(0)), random.Random(1))
    tenants = [each.tenant for each in shared_out(asked, (3.0, 1.0), random.Random(2))]
    assert tenants.count("tenant-0") / len(tenants) == pytest.approx(0.75, abs=0.03)


def test_names_are_one_for_each_whole_chunk() -> None:
    assert len(own_names(1, 63)) == 0
    assert len(own_names(1, 64)) == 1
    assert len(own_names(1, 1000)) == 15
