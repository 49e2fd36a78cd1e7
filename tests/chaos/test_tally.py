from __future__ import annotations

import pytest
from chaos.ask import Delivered, Delivery, Ended
from chaos.judge import Fault
from chaos.report import Report
from chaos.tally import Tally
from chaos.templates import Template

REQUEST = Template("request", "/v1/completions", {})


def delivery(ended: Ended) -> Delivery:
    return Delivery(
        REQUEST, {0: Delivered([1, 2])}, ended=ended, status=200, longest_pause=2.0, request_id="x"
    )


def report(tally: Tally, **changes: object) -> Report:
    values: dict[str, object] = {
        "command": "",
        "seconds": 1.0,
        "faults": {},
        "moves": 0,
        "leaks": {},
        "exit_codes": {"worker-0": 0},
        "problems": [],
    }
    return Report(tally=tally, **{**values, **changes})  # type: ignore[arg-type] # fields of several types


def test_what_a_killed_gateway_and_leaving_clients_end_is_no_failure() -> None:
    tally = Tally()
    for ended in ("complete", "left", "turned away"):
        tally.take(delivery(ended), None, gateway_died=False)
    tally.take(delivery("broken"), None, gateway_died=True)
    assert (tally.complete, tally.left, tally.turned_away, tally.with_gateway) == (1, 1, 1, 1)
    assert tally.streams == 3, "what was turned away was never a stream"
    assert (tally.longest_pause_seconds, tally.longest_pause_request) == (2.0, "x")
    assert not report(tally).failed


@pytest.mark.parametrize(
    ("ended", "fault", "kind"),
    [
        ("complete", Fault("doubled", "2 tokens too many"), "doubled"),
        ("complete", Fault("wrong", "another token"), "wrong"),
        ("complete", Fault("lost", "no end"), "lost"),
        ("broken", None, "lost"),
        ("error", None, "errors"),
    ],
)
def test_everything_else_fails_the_run(ended: Ended, fault: Fault | None, kind: str) -> None:
    tally = Tally()
    tally.take(delivery(ended), fault, gateway_died=False)
    assert tally.failures[kind] == 1
    found = report(tally)
    assert found.failed
    assert "FAILED" in found.table()
    assert kind in found.table()


@pytest.mark.parametrize(
    "change",
    [
        {"leaks": {"worker-0 kv_blocks used": 1.0}},
        {"exit_codes": {"worker-0": None}},
        {"exit_codes": {"worker-0": -9}},
        {"problems": ["it ended by itself"]},
    ],
)
def test_leaks_and_unclean_ends_fail_the_run(change: dict[str, object]) -> None:
    assert report(Tally(), **change).failed
