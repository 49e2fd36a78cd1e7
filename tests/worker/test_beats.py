import threading

from sfllm.messages import WorkerBeat
from sfllm_worker.beats import Beater
from sfllm_worker.protocol_results import Outgoing

TIMEOUT_SECONDS = 10
BEAT = Outgoing(WorkerBeat(lease=1, step=0, running=1, waiting=0, free_kv_tokens=0))


def test_beats_go_on_while_a_step_runs_and_belong_to_the_loop_otherwise() -> None:
    beats: list[str] = []
    enough = threading.Event()

    def send(sent: WorkerBeat) -> None:
        assert sent is BEAT
        beats.append(threading.current_thread().name)
        if len(beats) >= 3:
            enough.set()

    beater = Beater(send)
    with beater:
        with beater.covering(BEAT, due=0.0, interval=0.01):
            assert enough.wait(TIMEOUT_SECONDS), "no beats during a long step"
        during = len(beats)
        assert not threading.Event().wait(0.2)
        assert len(beats) == during, "the loop has the link again"
    assert set(beats) == {"beater"}


def test_without_a_lease_nothing_is_sent_during_a_step() -> None:
    beats: list[Outgoing] = []
    beater = Beater(beats.append)
    with beater, beater.covering(None, due=0.0, interval=0.01):
        assert not threading.Event().wait(0.2)
    assert beats == []


def test_the_thread_ends_with_the_loop() -> None:
    beater = Beater(lambda _now: None)
    with beater:
        pass
    assert "beater" not in [thread.name for thread in threading.enumerate()]
