import threading

from sfllm_worker.beats import Beater

TIMEOUT_SECONDS = 10


def test_beats_go_on_while_a_step_runs_and_belong_to_the_loop_otherwise() -> None:
    beats: list[str] = []
    enough = threading.Event()

    def beat(_now: float) -> None:
        beats.append(threading.current_thread().name)
        if len(beats) >= 3:
            enough.set()

    beater = Beater(beat)
    with beater:
        with beater.covering():
            assert enough.wait(TIMEOUT_SECONDS), "no beats during a long step"
        during = len(beats)
        assert not threading.Event().wait(0.2)
        assert len(beats) == during, "the loop has the link again"
    assert set(beats) == {"beater"}


def test_the_thread_ends_with_the_loop() -> None:
    beater = Beater(lambda _now: None)
    with beater:
        pass
    assert "beater" not in [thread.name for thread in threading.enumerate()]
