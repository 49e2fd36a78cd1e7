"""How much a worker has left to prefill, when its messages come late and grants get lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfllm_scheduler.core.prefill import OutstandingPrefill


def granted(prefill: OutstandingPrefill, tokens: int) -> int:
    number = prefill.next_grant()
    prefill.charge(number, tokens)
    return number


def test_without_any_word_of_the_worker_all_that_it_holds_is_outstanding() -> None:
    prefill = OutstandingPrefill()
    first, second = granted(prefill, 100), granted(prefill, 50)
    assert prefill.tokens == 150
    prefill.discharge(first, 100)
    assert prefill.tokens == 50
    prefill.discharge(second, 50)
    assert prefill.tokens == 0


def test_what_the_worker_counted_and_what_it_had_not_seen_add_up() -> None:
    prefill = OutstandingPrefill()
    granted(prefill, 100)
    granted(prefill, 50)
    prefill.progress(1, 30)
    assert prefill.tokens == 30 + 50
    prefill.progress(2, 60)
    assert prefill.tokens == 60


def test_a_worker_cannot_have_more_left_than_what_it_holds() -> None:
    prefill = OutstandingPrefill()
    number = granted(prefill, 100)
    prefill.progress(1, 2**63)
    assert prefill.tokens == 100
    prefill.discharge(number, 100)
    assert prefill.tokens == 0


@pytest.mark.parametrize(("grants", "pending"), [(-1, 0), (2, 0), (1, -1), (2**64, 2**64)])
def test_counts_that_cannot_be_are_refused_and_change_nothing(grants: int, pending: int) -> None:
    prefill = OutstandingPrefill()
    granted(prefill, 100)
    with pytest.raises(ValueError, match="cannot have"):
        prefill.progress(grants, pending)
    assert prefill.tokens == 100


def test_a_lost_grant_does_not_make_later_ones_look_unseen() -> None:
    prefill = OutstandingPrefill()
    lost = granted(prefill, 100)
    prefill.discharge(lost, 100)  # its request was found missing
    later = granted(prefill, 50)
    prefill.progress(1, 0)
    assert prefill.tokens == 50, "the worker's first grant may be either"
    prefill.arrived(later)
    prefill.progress(1, 0)
    assert prefill.tokens == 0


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_with_messages_under_way_the_count_is_what_the_worker_had_and_what_it_will_get(
    data: st.DataObject,
) -> None:
    prefill = OutstandingPrefill()
    to_worker: list[tuple[int, int]] = []
    to_scheduler: list[tuple[int, int]] = []
    held: dict[int, int] = {}
    left: dict[int, int] = {}
    received = 0
    reported = (0, 0)
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(["grant", "arrive", "compute", "hear", "finish"]))
        if what == "grant":
            tokens = data.draw(st.integers(1, 100))
            number = granted(prefill, tokens)
            held[number] = tokens
            to_worker.append((number, tokens))
        elif what == "arrive" and to_worker:
            number, tokens = to_worker.pop(0)
            received += 1
            left[number] = tokens
        elif what == "compute" and left:
            number = min(left)
            left[number] -= data.draw(st.integers(0, left[number]))
            to_scheduler.append((received, sum(left.values())))
        elif what == "hear" and to_scheduler:
            reported = to_scheduler.pop(0)
            prefill.progress(*reported)
        elif what == "finish" and held:
            number = min(held)
            if left.get(number) == 0:
                prefill.discharge(number, held.pop(number))
        seen, pending = reported
        unseen = sum(tokens for number, tokens in held.items() if number > seen)
        known = sum(tokens for number, tokens in held.items() if number <= seen)
        assert prefill.tokens == unseen + min(pending, known)
        assert prefill.charged == sum(held.values())
