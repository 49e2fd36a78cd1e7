"""What a worker makes of grants, and what it says of each request."""

from protocol_driver import (
    GATEWAY,
    LEASE,
    joined,
    mock_engine,
)

from sfllm.messages import (
    Grant,
    GrantedRequest,
    Sampling,
    WorkerFault,
    WorkerFinished,
    WorkerProgress,
    WorkerResend,
    WorkerTokens,
)
from sfllm.wire import as_array
from sfllm_worker.engine.interface import Progress
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.mock.engine import MockEngine
from sfllm_worker.mock.tokens import mock_token, prompt_digest
from sfllm_worker.protocol import Outgoing


def test_tokens_of_an_open_choice_are_sent_again() -> None:
    driver = joined()
    driver.grant(1, choices=(0, 1), max_tokens=20)
    driver.step(6)
    before = driver.tokens()
    driver.sent.clear()
    driver.tell(WorkerResend(LEASE, GATEWAY, 1, 0, 1, 2))
    again = driver.tokens()
    assert again == {(1, 1): {i: token for i, token in before[1, 1].items() if i >= 2}}
    driver.sent.clear()
    for handle, attempt, choice, start in (
        (1, 0, 1, 6),
        (1, 0, 1, -1),
        (1, 1, 1, 0),
        (1, 0, 7, 0),
        (2, 0, 0, 0),
    ):
        driver.tell(WorkerResend(LEASE, GATEWAY, handle, attempt, choice, start))
    assert driver.tokens() == {}


def test_a_grant_that_comes_twice_runs_once_and_a_later_attempt_takes_its_place() -> None:
    driver = joined()
    driver.grant(1)
    driver.grant(1)
    driver.step(3)
    driver.grant(1, attempt=1, generated=(tuple(driver.tokens()[1, 0].values()),))
    driver.grant(1, attempt=0)
    driver.run()
    (end,) = driver.messages(WorkerFinished)
    assert (end.finished.attempt, end.finished.generated_tokens) == (1, 8)
    name = prompt_digest([1, 2, 3])
    assert driver.tokens()[1, 0] == {i: mock_token(1, 0, i, name) for i in range(8)}
    assert driver.all_free()


def test_a_request_that_cannot_run_here_is_a_fault() -> None:
    driver = joined()
    driver.grant(1, prompt=(259,))
    driver.grant(2, prompt=(1,) * 128)
    driver.grant(3, prompt=())
    driver.grant(4, stop_token_ids=(-1,))
    driver.grant(5, max_tokens=0)
    driver.grant(6, generated=((65,) * 8,))
    faults = driver.messages(WorkerFault)
    assert [(fault.handle, fault.code) for fault in faults] == [(n, "invalid_request") for n in range(1, 7)]
    assert driver.all_free()


def test_a_malformed_grant_is_survived() -> None:
    driver = joined()
    good = (GATEWAY, "r", 1, 0, (0,), 1, (0,), Sampling(max_tokens=1, seed=0), 0.0)
    for place, value in (
        (2, -1),
        (2, 2**64),
        (3, -1),
        (4, ()),
        (4, (0, 1)),
        (4, (-1,)),
        (5, 2),
        (6, (-1,)),
    ):
        fields = [*good]
        fields[place] = value
        driver.tell(
            Grant(LEASE, (GrantedRequest(*fields),)), as_array("I", [1]), as_array("I", []), as_array("Q", [])
        )
    driver.tell(
        Grant(LEASE, (GrantedRequest(*good[:4], (0, 0), 1, (0, 0), *good[7:]),)),
        *(as_array("I", [1]), as_array("I", []), as_array("Q", [])),
    )
    driver.grant(2)
    driver.run()
    assert [end.finished.handle for end in driver.messages(WorkerFinished)] == [2]
    assert driver.all_free()


class SpoiledEngine(MockEngine):
    """The output of choice 0 is not finite."""

    def _next(self, sequence: Sequence, digest: bytes) -> Progress:
        if sequence.choice == 0:
            self.planner.remove(sequence)
            return Progress(sequence, None, "fault")
        return super()._next(sequence, digest)


def test_a_request_fails_as_a_whole_even_when_another_choice_ends_in_the_same_step() -> None:
    engine = mock_engine()
    engine.__class__ = SpoiledEngine
    driver = joined(engine)
    driver.grant(1, choices=(0, 1, 2), generated=((), (65,) * 7, (65,)))
    driver.run()
    assert [fault.code for fault in driver.messages(WorkerFault)] == ["engine_failure"]
    assert [end.finished.choice for end in driver.messages(WorkerFinished)] == [1]
    assert driver.all_free()


def test_tokens_leave_before_the_end_and_each_gateway_gets_its_own() -> None:
    driver = joined()
    driver.grant(1, max_tokens=1)
    driver.grant(1, gateway=b"g-2", max_tokens=1)
    driver.step()
    kinds = [type(o.message) for o in driver.collect() if isinstance(o, Outgoing)]
    assert kinds == [WorkerTokens, WorkerTokens, WorkerFinished, WorkerFinished, WorkerProgress]
    assert {message.gateway for message in driver.messages(WorkerTokens)} == {GATEWAY, b"g-2"}


def test_timings_are_those_of_the_stages() -> None:
    driver = joined()
    driver.grant(max_tokens=5)
    driver.now += 2.0
    driver.run()
    timings = driver.messages(WorkerFinished)[0].finished.timings
    assert round(timings.queue_seconds, 6) == 2.5
    assert round(timings.prefill_seconds, 6) == 0.01
    assert round(timings.decode_seconds, 6) == 0.04
