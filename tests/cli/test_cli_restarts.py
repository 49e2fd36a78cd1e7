from hypothesis import given
from hypothesis import strategies as st

from sfllm_cli.restarts import GiveUp, RestartHistory, RestartPolicy

POLICY = RestartPolicy(crash_limit=5, window_seconds=60, first_delay_seconds=0.5, max_delay_seconds=15)


def test_the_delay_doubles_with_each_death_in_a_row_up_to_its_bound() -> None:
    history = RestartHistory(POLICY)
    # Far enough apart to be no crash loop, while none of them lived long.
    delays = [history.died(at * 61.0, lived_seconds=1, served=False, exit_code=1) for at in range(8)]
    assert delays == [0.5, 1, 2, 4, 8, 15, 15, 15]


def test_deaths_after_serving_never_lead_to_long_waits() -> None:
    history = RestartHistory(POLICY)
    delays = [history.died(float(at), lived_seconds=1, served=True, exit_code=-11) for at in range(20)]
    assert delays == [0.5, *[1] * 19]


def test_a_process_that_cannot_load_any_more_beside_one_that_serves_is_tried_ever_less_often() -> None:
    history = RestartHistory(POLICY)
    delays = [history.died(float(at), lived_seconds=1, served=True, exit_code=2) for at in range(8)]
    assert delays == [0.5, 1, 2, 4, 8, 15, 15, 15]


def test_a_process_that_was_asked_to_end_starts_again_soon_however_often() -> None:
    history = RestartHistory(POLICY)
    assert [history.died(float(at), lived_seconds=1, served=True, exit_code=0) for at in range(8)] == [
        0.5
    ] * 8


def test_ending_with_0_without_ever_serving_is_a_crash_like_any_other() -> None:
    history = RestartHistory(POLICY)
    verdicts = [history.died(float(at), lived_seconds=0.1, served=False, exit_code=0) for at in range(5)]
    assert verdicts == [0.5, 1, 2, 4, GiveUp("died 5 times without becoming ready")]


def test_the_fifth_death_in_a_minute_without_ever_serving_is_the_last() -> None:
    history = RestartHistory(POLICY)
    verdicts = [history.died(at * 10.0, lived_seconds=1, served=False, exit_code=1) for at in range(5)]
    assert not any(isinstance(verdict, GiveUp) for verdict in verdicts[:4])
    assert verdicts[4] == GiveUp("died 5 times without becoming ready")


def test_deaths_that_are_minutes_apart_are_no_crash_loop() -> None:
    history = RestartHistory(POLICY)
    verdicts = [history.died(at * 61.0, lived_seconds=60.5, served=False, exit_code=1) for at in range(20)]
    assert verdicts == [0.5] * 20


def test_a_death_after_serving_forgives_the_earlier_crashes() -> None:
    history = RestartHistory(POLICY)
    for at in range(4):
        history.died(float(at), lived_seconds=1, served=False, exit_code=1)
    history.died(4.0, lived_seconds=1, served=True, exit_code=-9)
    later = [history.died(float(at), lived_seconds=1, served=False, exit_code=1) for at in range(5, 9)]
    assert not any(isinstance(verdict, GiveUp) for verdict in later)


def test_a_process_that_refuses_its_settings_is_not_started_again() -> None:
    verdict = RestartHistory(POLICY).died(0.0, lived_seconds=0.1, served=False, exit_code=2)
    assert verdict == GiveUp("refused its settings")


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e5), st.booleans(), st.sampled_from([0, 1, -9]))))
def test_a_verdict_is_a_delay_within_bounds_or_the_end(
    deaths: list[tuple[float, float, bool, int]],
) -> None:
    history = RestartHistory(POLICY)
    now = 0.0
    for pause, lived, served, code in deaths:
        now += pause
        verdict = history.died(now, lived_seconds=lived, served=served, exit_code=code)
        assert isinstance(verdict, GiveUp) or 0.5 <= verdict <= 15
        assert not (served and isinstance(verdict, GiveUp))
