"""How long a step may take, and that a process whose loop hangs is ended whatever it hangs in."""

import subprocess
import sys
import time

from sfllm_worker.watchdog import Watchdog

TIMEOUT_SECONDS = 60


def test_the_bound_is_ten_times_the_longest_step_and_no_less_than_was_asked_for() -> None:
    assert Watchdog(20.0, expected_step_seconds=0.5).bound_seconds == 20
    watchdog = Watchdog(20.0, expected_step_seconds=3.0)
    assert watchdog.bound_seconds == 30
    watchdog.saw_step(5.0)
    assert watchdog.bound_seconds == 50


def test_a_step_that_was_long_by_accident_is_forgotten_in_time() -> None:
    watchdog = Watchdog(20.0, expected_step_seconds=0.1)
    watchdog.saw_step(19.0)
    for _ in range(200):
        watchdog.saw_step(0.1)
    assert watchdog.bound_seconds > 100, "not at once: it may come again"
    for _ in range(3000):
        watchdog.saw_step(0.1)
    assert watchdog.bound_seconds == 20


def test_health_complains_before_the_process_is_ended() -> None:
    watchdog = Watchdog(600.0, expected_step_seconds=0.0)
    assert watchdog.problem(1e9) is None, "the loop has not begun"
    watchdog.turn(1000.0)
    try:
        assert watchdog.problem(1200.0) is None
        assert watchdog.problem(1400.0) == "the loop has not turned for 400 s"
    finally:
        watchdog.stop()
    assert watchdog.problem(1e9) is None, "it has ended"


def test_a_call_that_hangs_with_the_interpreters_lock_is_ended_with_a_traceback() -> None:
    code = (
        "import ctypes, time\n"
        "from sfllm_worker.watchdog import Watchdog\n"
        "def hang():\n"
        "    ctypes.PyDLL(None).sleep(600)  # keeps the lock, as native code may\n"
        "Watchdog(0.1, 0.0).turn(time.monotonic())\n"
        "hang()\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert done.returncode == 1
    assert "in hang" in done.stderr
    assert time.monotonic() - started >= 1
