import pytest

from sfllm.messages import ALL_CHOICES, GrantedRequest, Sampling
from sfllm.wire import as_array
from sfllm_worker.ledger import HeldRequest, Ledger, RequestKey, split_grant

KEY = RequestKey(b"g", 7)
NO_NAMES = as_array("Q", ())


def granted(
    attempt: int = 0, choices: tuple[int, ...] = (0,), counts: tuple[int, ...] = (0,)
) -> GrantedRequest:
    return GrantedRequest(b"g", "req", 7, attempt, choices, 3, counts, Sampling(max_tokens=9, seed=1), 0.0)


def accept(ledger: Ledger, request: GrantedRequest) -> HeldRequest | None:
    generated = [list(range(100, 100 + count)) for count in request.generated_counts]
    return ledger.accept(request, [1, 2, 3], generated, now=0.0)


def test_fresh_choices_share_one_sequence_and_resumed_ones_have_their_own() -> None:
    held = accept(Ledger(8), granted(choices=(0, 1, 2, 5), counts=(0, 2, 0, 1)))
    assert held is not None
    assert held.sequences[0].fork_choices == (2,)
    assert held.sequences[1].tokens == [1, 2, 3, 100, 101]
    assert held.sequences[5].tokens == [1, 2, 3, 100]
    assert held.sequences[5].prompt_count == 3


def test_more_choices_than_a_step_holds_start_in_groups() -> None:
    held = accept(Ledger(2), granted(choices=(0, 1, 2, 3, 4), counts=(0,) * 5))
    assert held is not None
    assert {c: s.fork_choices for c, s in held.sequences.items()} == {0: (1,), 2: (3,), 4: ()}


def test_a_grant_that_comes_twice_is_taken_once() -> None:
    ledger = Ledger(8)
    assert accept(ledger, granted()) is not None
    assert accept(ledger, granted()) is None
    assert len(ledger) == 1


def test_a_cancel_of_an_earlier_attempt_leaves_a_later_one_alone() -> None:
    ledger = Ledger(8)
    accept(ledger, granted(attempt=2))
    assert ledger.cancel(KEY, 1, ALL_CHOICES).sequences == []
    assert len(ledger.cancel(KEY, 2, ALL_CHOICES).sequences) == 1
    assert len(ledger) == 0


def test_when_the_leading_choice_is_cancelled_a_fork_takes_its_place() -> None:
    ledger = Ledger(8)
    held = accept(ledger, granted(choices=(0, 1, 2), counts=(0, 0, 0)))
    assert held is not None
    leader = held.sequences[0]
    stopped = ledger.cancel(KEY, 0, 0)
    assert (stopped.sequences, stopped.forks) == ([], [(leader, 1)])
    assert leader.choice == 1
    assert held.open_choices == {1, 2}


def test_a_choice_that_has_not_branched_off_is_cancelled_at_its_leader() -> None:
    ledger = Ledger(8)
    held = accept(ledger, granted(choices=(0, 1), counts=(0, 0)))
    assert held is not None
    assert ledger.cancel(KEY, 0, 1).forks == [(held.sequences[0], 1)]


def test_a_request_is_forgotten_when_its_last_choice_ends() -> None:
    ledger = Ledger(8)
    held = accept(ledger, granted(choices=(0, 1), counts=(0, 0)))
    assert held is not None
    ledger.finish(held, 0)
    assert ledger.get(KEY) is held
    ledger.finish(held, 1)
    assert ledger.get(KEY) is None


def test_a_grant_is_split_into_its_requests_tokens() -> None:
    requests = (granted(choices=(0, 1), counts=(2, 1)), granted())
    (_, p1, g1, _), (_, p2, g2, _) = split_grant(
        requests, as_array("I", range(6)), as_array("I", [9, 8, 7]), NO_NAMES
    )
    assert (p1, g1, p2, g2) == ([0, 1, 2], [[9, 8], [7]], [3, 4, 5], [[]])


def test_a_grant_whose_counts_do_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt counts"):
        list(split_grant((granted(),), as_array("I", [1]), as_array("I", []), NO_NAMES))
    with pytest.raises(ValueError, match="output counts"):
        list(split_grant((granted(),), as_array("I", [1, 2, 3]), as_array("I", [4]), NO_NAMES))
