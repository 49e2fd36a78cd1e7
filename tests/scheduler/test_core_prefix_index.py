"""Which worker has which beginning of a prompt: the index against a plain account of beats and grants."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sfllm.prefixes import MAX_SUMMARY_PREFIXES
from sfllm_scheduler.core.prefix_index import MAX_NAMES, PrefixIndex

PROMPTS = [[100 * root + depth for depth in range(1, 7)] for root in (1, 2)]
PROMPTS.append([*PROMPTS[0][:3], 301, 302, 303])  # branches off the first one
BEGINNINGS = [prompt[:length] for prompt in PROMPTS for length in range(len(prompt) + 1)]


class Naive:
    """A worker's grants since the beat before the last one, and what the last one listed."""

    def __init__(self) -> None:
        self.summary: set[int] = set()
        self.since_last: set[int] = set()
        self.before_last: set[int] = set()

    def beat(self, summary: set[int]) -> None:
        self.summary, self.before_last, self.since_last = summary, self.since_last, set()

    @property
    def names(self) -> set[int]:
        return self.summary | self.since_last | self.before_last

    def cached(self, names: list[int]) -> int:
        return next((n for n in range(len(names), 0, -1) if names[n - 1] in self.names), 0)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_index_knows_what_a_plain_account_of_beats_and_grants_knows(data: st.DataObject) -> None:
    index, workers = PrefixIndex(), dict[int, Naive]()
    for _ in range(data.draw(st.integers(1, 30))):
        worker = data.draw(st.integers(1, 4))
        what = data.draw(st.sampled_from(["grant", "grant", "beat", "leave"]))
        if worker not in workers:
            index.join(worker)
            workers[worker] = Naive()
        elif what == "leave":
            index.leave(worker)
            del workers[worker]
        elif what == "grant":
            names = data.draw(st.sampled_from(BEGINNINGS))
            index.grant(worker, names)
            workers[worker].since_last.update(names)
        else:
            chosen = data.draw(st.lists(st.sampled_from(BEGINNINGS), max_size=3))
            summary = [name for names in chosen for name in names]
            index.beat(worker, summary)
            workers[worker].beat(set(summary))
        for prompt in PROMPTS:
            best = max((naive.cached(prompt) for naive in workers.values()), default=0)
            assert index.longest(prompt) == best
            for lease, naive in workers.items():
                assert index.cached(lease, prompt) == naive.cached(prompt)
                assert index.names(lease) == naive.names
            for name in prompt:
                holders = sorted(lease for lease, naive in workers.items() if name in naive.names)
                assert sorted(index.holders(name)) == holders


def test_a_grant_counts_until_the_second_beat_after_it() -> None:
    index = PrefixIndex()
    index.join(1)
    index.grant(1, [7])
    index.beat(1, [])
    assert index.cached(1, [7]) == 1, "the beat may have been under way when the grant was sent"
    index.beat(1, [])
    assert index.cached(1, [7]) == 0


def test_memory_is_bounded_whatever_a_worker_lists_and_is_granted() -> None:
    index = PrefixIndex()
    index.join(1)
    index.beat(1, range(10 * MAX_SUMMARY_PREFIXES))
    assert len(index) == MAX_SUMMARY_PREFIXES
    for start in range(0, 3 * MAX_NAMES, 200):
        index.grant(1, range(10**6 + start, 10**6 + start + 200))
    assert len(index) == len(index.names(1)) == MAX_NAMES
    assert 10**6 + start in index.names(1), "the newest are kept"
    index.leave(1)
    assert len(index) == 0


def test_names_that_are_no_beginnings_of_each_other_cost_no_more_than_a_missed_hit() -> None:
    index = PrefixIndex()
    index.join(1)
    index.beat(1, [3])
    assert index.cached(1, [1, 2, 3, 4]) in (0, 3), "only a name that is there is ever found"
