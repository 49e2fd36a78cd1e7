"""How a worker joins its scheduler, stays joined, and what it says of all that it holds."""

from protocol_driver import (
    BEAT_SECONDS,
    EPOCH,
    GATEWAY,
    LEASE,
    LEASE_SECONDS,
    Driver,
    joined,
    mock_engine,
)

from sfllm.holdings import OpenChoice, digest
from sfllm.messages import (
    ALL_CHOICES,
    Drain,
    ListHeld,
    SchedulerBeat,
    WorkerBeat,
    WorkerCancel,
    WorkerFinished,
    WorkerHeld,
    WorkerHello,
    WorkerTokens,
    WorkerUnknown,
)
from sfllm_worker.protocol import ClearOutbox, Outgoing


def test_it_says_hello_every_second_until_it_is_welcome() -> None:
    driver = Driver(mock_engine())
    for seconds, hellos in ((0.0, 1), (0.5, 1), (0.6, 2), (0.5, 2), (0.6, 3)):
        driver.wait(seconds)
        assert len(driver.messages(WorkerHello)) == hellos
    driver.join()
    driver.wait(1.5)
    assert len(driver.messages(WorkerHello)) == 3
    assert driver.protocol.lease == LEASE


def test_beats_carry_the_digest_of_the_open_choices() -> None:
    driver = joined()
    driver.wait(0.0)
    driver.grant(5, choices=(0, 2))
    driver.grant(6, gateway=b"g-2", attempt=3)
    driver.tell(WorkerCancel(LEASE, GATEWAY, 5, 0, 2))
    driver.wait(BEAT_SECONDS)
    driver.run()
    driver.wait(BEAT_SECONDS)
    held = [OpenChoice(GATEWAY, 5, 0, 0), OpenChoice(b"g-2", 6, 3, 0)]
    assert [beat.digest for beat in driver.messages(WorkerBeat)] == [0, digest(held), 0]


def test_a_beat_is_due_every_interval() -> None:
    driver = joined()
    for _ in range(40):
        driver.wait(BEAT_SECONDS / 10)
        driver.tell(SchedulerBeat(EPOCH))
    assert len(driver.messages(WorkerBeat)) == 4
    assert 0 < driver.protocol.seconds_to_timer(driver.now) <= BEAT_SECONDS


def test_a_welcome_that_comes_twice_or_late_changes_nothing() -> None:
    driver = joined()
    driver.grant()
    driver.join()
    driver.join(LEASE - 1)
    assert (driver.protocol.lease, driver.protocol.held_requests) == (LEASE, 1)


def test_under_a_new_lease_everything_begins_anew() -> None:
    driver = joined()
    driver.grant()
    driver.step()
    driver.join(LEASE + 1)
    assert driver.protocol.lease == LEASE + 1
    assert driver.all_free()


def test_a_worker_that_is_not_known_drops_everything_and_says_hello_at_once() -> None:
    driver = joined()
    driver.grant()
    driver.step()
    driver.tell(WorkerUnknown(EPOCH + 1))
    driver.wait(0.0)
    new = driver.collect()
    assert isinstance(new[-2], ClearOutbox)
    assert isinstance(new[-1], Outgoing)
    assert isinstance(new[-1].message, WorkerHello)
    assert not any(isinstance(o, Outgoing) and isinstance(o.message, WorkerTokens) for o in new)
    assert driver.protocol.lease is None
    assert driver.all_free()
    driver.tell(WorkerUnknown(EPOCH + 1))
    driver.wait(0.1)
    assert driver.collect() == [], "the hello is under way"


def test_a_beat_of_another_epoch_ends_the_lease() -> None:
    driver = joined()
    driver.grant()
    driver.tell(SchedulerBeat(EPOCH))
    assert driver.protocol.lease == LEASE
    driver.tell(SchedulerBeat(EPOCH + 1))
    assert driver.protocol.lease is None
    assert driver.all_free()


def test_silence_ends_the_lease_and_any_message_renews_it() -> None:
    driver = joined()
    driver.grant()
    for _ in range(3):
        driver.now += LEASE_SECONDS * 0.9
        driver.tell(SchedulerBeat(EPOCH))
        driver.wait(0.0)
        assert driver.protocol.lease == LEASE
    driver.wait(LEASE_SECONDS)
    assert driver.protocol.lease is None
    assert driver.all_free()
    assert isinstance(driver.messages(WorkerHello)[-1], WorkerHello)


def test_nothing_is_done_for_a_lease_that_is_gone() -> None:
    driver = joined()
    driver.grant(1)
    driver.grant(2, lease=LEASE - 1)
    driver.tell(WorkerCancel(LEASE - 1, GATEWAY, 1, 0, ALL_CHOICES))
    driver.tell(Drain(LEASE - 1))
    assert driver.protocol.held_requests == 1
    assert not driver.protocol.draining
    driver.protocol.lose("a test", driver.now)
    driver.grant(3)
    driver.tell(ListHeld(1))
    assert driver.protocol.held_requests == 0
    assert driver.messages(WorkerHeld) == []


def test_when_nothing_can_be_sent_the_lease_is_lost() -> None:
    driver = joined()
    driver.grant()
    driver.step()
    driver.protocol.lose("the outbox is full", driver.now)
    assert [type(o) for o in driver.collect()] == [ClearOutbox]
    assert driver.all_free()
    driver.wait(0.0)
    driver.join(LEASE + 1)
    driver.grant(lease=LEASE + 1)
    driver.run()
    assert len(driver.messages(WorkerFinished)) == 1


def test_the_list_names_every_open_choice() -> None:
    driver = joined()
    driver.grant(5, choices=(0, 3), attempt=2)
    driver.grant(9, gateway=b"g-2")
    driver.step()
    driver.tell(ListHeld(17))
    (outgoing,) = [
        o for o in driver.collect() if isinstance(o, Outgoing) and isinstance(o.message, WorkerHeld)
    ]
    assert outgoing.message == WorkerHeld(LEASE, 17, (GATEWAY, b"g-2"))
    assert [column.tolist() for column in outgoing.arrays] == [[0, 0, 1], [5, 5, 9], [2, 2, 0], [0, 3, 0]]


def test_an_empty_list_is_an_answer_too() -> None:
    driver = joined()
    driver.tell(ListHeld(1))
    assert driver.messages(WorkerHeld) == [WorkerHeld(LEASE, 1, ())]
