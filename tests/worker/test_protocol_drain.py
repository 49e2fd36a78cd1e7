"""How a worker leaves."""

from protocol_driver import (
    BEAT_SECONDS,
    GATEWAY,
    LEASE,
    Driver,
    joined,
    mock_engine,
)

from sfllm.messages import (
    Drain,
    WorkerBye,
    WorkerDraining,
    WorkerFinished,
    WorkerHello,
    WorkerReturned,
)


def test_a_drain_gives_back_what_has_not_begun_and_finishes_the_rest() -> None:
    driver = joined(mock_engine(max_sequences=2))
    driver.grant(1, choices=(0, 1))
    driver.step()
    driver.grant(2)
    driver.tell(Drain(LEASE))
    assert driver.messages(WorkerDraining) == [WorkerDraining(LEASE)]
    assert driver.messages(WorkerReturned) == [WorkerReturned(LEASE, GATEWAY, 2, 0)]
    driver.grant(3, attempt=4)
    assert driver.messages(WorkerReturned)[1:] == [WorkerReturned(LEASE, GATEWAY, 3, 4)]
    assert not driver.protocol.drained
    driver.run()
    assert {finished.finished.handle for finished in driver.messages(WorkerFinished)} == {1}
    assert driver.protocol.drained
    driver.protocol.leave("")
    assert driver.messages(WorkerBye) == [WorkerBye(LEASE)]


def test_a_preempted_request_has_begun_and_is_not_given_back() -> None:
    driver = joined(mock_engine(kv_tokens=40))
    for handle in range(3):
        driver.grant(handle, prompt=(handle,) * 10, max_tokens=20)
    driver.step(8)
    assert driver.engine.num_waiting, "the cache is too small for all of them"
    driver.protocol.drain(driver.now)
    assert driver.messages(WorkerReturned) == []
    driver.run()
    assert len(driver.messages(WorkerFinished)) == 3


def test_a_drain_ends_at_its_time_with_a_goodbye() -> None:
    driver = joined(drain_seconds=3.0)
    driver.grant(max_tokens=100)
    driver.step()
    driver.protocol.drain(driver.now)
    for _ in range(2):
        driver.wait(1.0)
        driver.protocol.drain(driver.now)
        assert not driver.protocol.drained
    driver.wait(1.0)
    assert driver.protocol.drained
    driver.protocol.leave("")
    assert driver.protocol.held_requests == 0
    assert driver.messages(WorkerBye) == [WorkerBye(LEASE)]


def test_the_news_of_a_drain_is_repeated_with_each_beat() -> None:
    driver = joined()
    driver.grant()
    driver.step()
    driver.protocol.drain(driver.now)
    driver.wait(BEAT_SECONDS)
    driver.wait(BEAT_SECONDS)
    assert len(driver.messages(WorkerDraining)) == 3


def test_without_a_lease_a_drain_is_over_at_once_and_no_hello_is_said() -> None:
    driver = Driver(mock_engine())
    driver.protocol.drain(driver.now)
    driver.wait(2.0)
    assert driver.protocol.drained
    driver.protocol.leave("")
    assert driver.messages(WorkerHello) == driver.messages(WorkerBye) == []


def test_after_a_failure_it_says_why_and_is_deaf() -> None:
    driver = joined()
    driver.grant()
    driver.protocol.leave("RuntimeError: broken")
    assert driver.messages(WorkerBye) == [WorkerBye(LEASE, "RuntimeError: broken")]
    driver.join(LEASE + 1)
    driver.wait(60.0)
    assert driver.collect() == []
    assert driver.protocol.held_requests == 0
