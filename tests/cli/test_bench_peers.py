"""The pure parts of the comparison with other servers: the roofline, the table, the ratios."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from bench.peers.comparison import Comparison, Options
from bench.peers.contenders import Contender
from bench.peers.install import vllm_requirements
from bench.peers.picture import draw
from bench.peers.processes import Running, StartError, running
from bench.peers.results import Row, pairs
from bench.peers.results import row as make_row
from bench.peers.roofline import Machine, ModelSize, Size, floor_seconds
from bench.peers.shortening import done_after, why_not
from bench.peers.starts import Start, start_of, started
from bench.peers.tables import main_table, pair_table, ratios, report, services_table
from bench.peers.workloads import (
    GROUPS,
    PACED,
    SATURATED,
    closed_workloads,
    paced_workload,
    seed_workloads,
)
from bench.peers.writing import Written
from hypothesis import given
from hypothesis import strategies as st
from openai_server import OpenAIServer
from openai_server import running as serving

from sfllm_cli.bench.command import read_trace
from sfllm_cli.bench.cpu import CpuUse
from sfllm_cli.bench.figures import Summary, figures
from sfllm_cli.bench.rounds import Leg, results
from sfllm_cli.bench.workload import Point, bodies, points, shapes

SMOLLM2 = ModelSize(30, 576, 9, 3, 64, 1536, 49152)
MACHINE = Machine(read_bytes=25e9, operations=2.3e12, int8_operations=3.5e12)


def test_the_default_model_has_as_many_weights_as_it_is_said_to_have() -> None:
    assert SMOLLM2.weights == pytest.approx(134.5e6, rel=0.001)
    assert SMOLLM2.cache_bytes_per_token == 23040


def test_a_long_answer_alone_takes_as_long_as_reading_all_weights_for_each_token() -> None:
    seconds = floor_seconds(MACHINE, SMOLLM2, "bf16", [Size(1, 0, 101)], 1)
    assert seconds / 101 == pytest.approx(SMOLLM2.weights * 2 / 25e9, rel=0.01)


def test_requests_at_once_share_the_reading_of_weights() -> None:
    requests = [Size(16, 0, 128)] * 40
    together = floor_seconds(MACHINE, SMOLLM2, "bf16", requests, 40)
    assert floor_seconds(MACHINE, SMOLLM2, "bf16", requests, 1) > 10 * together


def test_a_shared_prefix_is_computed_once_and_read_once_in_a_step() -> None:
    requests = [Size(544, 512, 32)] * 48
    apart = floor_seconds(MACHINE, SMOLLM2, "bf16", [Size(544, 0, 32)] * 48, 16)
    assert floor_seconds(MACHINE, SMOLLM2, "bf16", requests, 16) < apart / 2


def test_quantized_weights_may_be_multiplied_as_integers() -> None:
    prompts = [Size(512, 0, 1)] * 20
    seconds = {name: floor_seconds(MACHINE, SMOLLM2, name, prompts, 20) for name in ("bf16", "int8")}
    assert seconds["bf16"] / seconds["int8"] == pytest.approx(3.5 / 2.3, rel=0.001)


def test_only_the_phases_of_one_request_alone_follow_each_other() -> None:
    one = Size(256, 0, 64)
    # As much time for a prefill as for all steps: at once, one's steps hide in another's prefill.
    even = MACHINE._replace(operations=2 * SMOLLM2.layer_weights * 256 / (63 * SMOLLM2.weights * 2 / 25e9))
    alone = floor_seconds(even, SMOLLM2, "bf16", [one], 1)
    assert floor_seconds(even, SMOLLM2, "bf16", [one] * 2, 1) == pytest.approx(2 * alone)
    assert floor_seconds(even, SMOLLM2, "bf16", [one] * 2, 2) < 1.4 * alone


sizes = st.lists(
    st.builds(Size, st.integers(64, 512), st.just(0), st.integers(1, 128)), min_size=1, max_size=50
)


@given(sizes, st.integers(1, 64))
def test_less_to_read_or_to_compute_never_takes_longer(requests: list[Size], at_once: int) -> None:
    whole = floor_seconds(MACHINE, SMOLLM2, "bf16", requests, at_once)
    assert 0 < whole < math.inf
    assert floor_seconds(MACHINE, SMOLLM2, "Q4_1", requests, at_once) <= whole
    assert floor_seconds(MACHINE, SMOLLM2, "bf16", requests, at_once + 1) <= whole
    shared = [size._replace(shared=64) for size in requests]
    assert floor_seconds(MACHINE, SMOLLM2, "bf16", shared, at_once) <= whole
    assert floor_seconds(MACHINE, SMOLLM2, "bf16", requests[1:], at_once) <= whole


def row(workload: str, server: str, rate: float, precision: str = "bf16") -> Row:
    return Row(
        workload=workload,
        server=server,
        precision=precision,
        rounds=5,
        disturbed=0,
        failed=0,
        output_tokens=1024,
        tokens_per_second=rate,
        lowest=rate - 1,
        highest=rate + 1,
        requests_per_second=rate / 128,
        ttft_p50=50.0,
        ttft_p99=60.0,
        itl_p50=math.nan,
        itl_p99=20.0,
        end_to_end_mean=900.0,
        server_cores=1.9,
        services_cores=math.nan,
        roofline_share=0.5,
    )


ROWS = [
    row("W1", "sfllm", 50),
    row("W1", "vllm", 40),
    row("W1", "llama.cpp-q4_1", 150, "Q4_1"),
    row("W2", "sfllm", 300),
    row("W2", "vllm", 600),
    row("W2", "generate", 24),
]


def test_ratios_are_to_the_best_peer_of_the_same_precision() -> None:
    assert ratios(ROWS) == "ratios: W1 bf16 1.25x vllm; W2 bf16 0.50x vllm, bf16 12.50x generate"
    assert ratios(ROWS[:1]) == "ratios: nothing to compare"


def test_our_best_quantization_is_compared_with_the_best_of_all_peers_and_with_our_own_bf16() -> None:
    own = [row("W1", "sfllm-int8", 90, "int8"), row("W1", "sfllm-int4", 180, "int4")]
    text = ratios([*ROWS, *own, row("W2", "sfllm-int4", 330, "int4")])
    assert "W1 bf16 1.25x vllm, best quantization int4 1.20x llama.cpp-q4_1 (Q4_1), int4 3.60x our" in text
    assert "best quantization int4 0.55x vllm (bf16), int4 1.10x our bf16" in text


def test_at_a_set_rate_latencies_are_compared_with_the_peer_that_has_the_most_capacity() -> None:
    rows = [row(SATURATED, "sfllm", 90), row(SATURATED, "vllm", 80), row(SATURATED, "transformers", 30)]
    paced = [row("W4 at 1.00/s", name, rate) for name, rate in (("sfllm", 10), ("vllm", 9))]
    found = pairs([*rows, *paced, row("W4 at 1.00/s", "transformers", 11)])
    assert [each.other.server for each in found] == ["vllm", "vllm"]
    assert "| W4 at 1.00/s | sfllm | vllm | both bf16 | same rate | 1.00x |" in pair_table(found)


START = Start("sfllm", 4.5, 5.0, 3, 2.0, 2.5, 2**30)


def test_the_report_has_a_line_for_every_row_and_every_start() -> None:
    vllm = Start("vllm", 90.0, 91.0, 0, None, None, 4 * 2**30)
    text = report(ROWS, [START, vllm], ["vllm did not run W4"], MACHINE, 2)
    assert "| W2 | vllm | bf16 | 5 | 600.0 (599.0 .. 601.0) |" in text
    assert "| sfllm | 4.5 / 5.0 | 2.0 / 2.5 (median of 3) | 1.00 GiB |" in text
    assert "| vllm | 90.0 / 91.0 | - / - | 4.00 GiB |" in text
    assert "- vllm did not run W4" in text
    assert text.splitlines()[-1] == ratios(ROWS)
    assert ROWS[0].to_json()["itl_p50"] is None


def test_a_row_that_failed_or_was_cut_short_says_so() -> None:
    bad = dataclasses.replace(ROWS[0], rounds=1, failed=2, disturbed=1, note="slow")
    assert "| 1; 2 failed; 1 disturbed; slow |" in main_table([bad])


def test_the_loads_of_the_seed_have_a_table_of_their_own() -> None:
    rows = [dataclasses.replace(row("20/100", "sfllm", 256), end_to_end_mean=9876.0, server_cores=1.8)]
    text = report([*ROWS, *rows], [], [], MACHINE, 2)
    assert "| 20/100 | sfllm | 5 | 2.00 | 9.88 | 90% |" in text
    assert text.count("20/100") == 1


def test_the_services_share_of_a_core_is_that_of_gateway_and_scheduler() -> None:
    rows = [dataclasses.replace(ROWS[3], services_cores=0.081), ROWS[4]]
    assert services_table(rows).splitlines()[2:] == ["| W2 | sfllm | 8.1% of one core |"]


def test_no_workload_sends_prompts_that_a_cache_may_know_from_another_one() -> None:
    seen: set[bytes] = set()
    workloads = [*closed_workloads(False), paced_workload(False, 1.0), *seed_workloads(False)]
    for workload in workloads:
        settings, point = workload.settings, points(workload.settings)[0]
        sizes = shapes(settings, point, settings.requests, read_trace(settings))
        for body in bodies(settings, "m", sizes, token_ids=True, salt=f"round 1 0 {point.label}"):
            prompt = json.loads(body)["prompt"]
            seen.add(json.dumps(prompt[settings.prefix_tokens :][:8]).encode())
    assert len(seen) == sum(workload.settings.requests for workload in workloads)


def leg(server: str, rate: float, number: int = 1, parts: tuple[tuple[str, float], ...] = ()) -> Leg:
    answered = dataclasses.replace(figures([]), output_tokens_per_second=rate)
    use = CpuUse(server=1.9, client=0.1, others=0.0, machine=2.0, parts=parts)
    return Leg(server, Point(concurrency=1), number, 0, answered, use, Summary.of([]))


def test_a_row_knows_the_cores_of_our_services_and_of_no_others() -> None:
    parts = (("sfllm_worker", 1.8), ("sfllm_gateway", 0.06), ("sfllm_scheduler", 0.02), ("sfllm", 0.02))
    legs = [leg("sfllm", 100, 1, parts), leg("vllm", 90, 1, (("VLLM::Worker", 1.9),))]
    made = [make_row("W1", "bf16", result, 1.0) for result in results(legs)]
    assert made[0].services_cores == pytest.approx(0.08)
    assert math.isnan(made[1].services_cores)


PRECISIONS = {"sfllm": "bf16", "vllm": "bf16", "llama.cpp": "bf16", "q4": "Q4_1", "q8": "Q8_0"}


def test_only_peers_far_behind_the_best_of_their_kind_are_done_early() -> None:
    rates = {"sfllm": 10, "vllm": 100, "llama.cpp": 49, "q4": 200, "q8": 99}
    legs = [leg(name, rate) for name, rate in rates.items()]
    assert done_after(legs, PRECISIONS) == {"llama.cpp", "q8"}
    # Medians count: one slow round does not make a slow server.
    legs += [leg(name, rate, number) for number in (2, 3) for name, rate in {**rates, "q8": 120}.items()]
    assert done_after(legs, PRECISIONS) == {"llama.cpp"}


def test_a_server_that_answers_nothing_is_done_be_it_ours_or_not() -> None:
    assert done_after([leg("sfllm", 0), leg("vllm", 5), leg("q4", 0)], PRECISIONS) == {"sfllm", "q4"}
    assert done_after([leg("sfllm", 3)], PRECISIONS) == set()


def test_peers_far_behind_on_w2_do_not_run_w4_nor_those_without_the_capacity_its_latencies() -> None:
    rows = [row("W2", "vllm", 400), row("W2", "q4", 90), row("W2", "sfllm", 80)]
    assert why_not("q4", "W4", None, rows) == "below 25% of the best peer on W2"
    assert [why_not(name, "W4", None, rows) for name in ("vllm", "sfllm", "new")] == [None] * 3
    assert why_not("q4", "W3", None, rows) is None
    saturated = [row(SATURATED, "vllm", 256), row(SATURATED, "q8", 128)]
    assert why_not("q8", "W4", 1.6, saturated) == "its capacity is 1.00 requests/s"
    assert why_not("vllm", "W4", 1.6, saturated) is None


def test_the_picture_is_drawn_for_any_rows() -> None:
    rows = [*ROWS, row("W4 at 1.00/s", "sfllm", 10), dataclasses.replace(ROWS[0], workload="W3")]
    assert draw(rows).startswith(b"\x89PNG")
    assert draw([]).startswith(b"\x89PNG")


def test_only_what_the_server_loads_is_installed_for_vllm(tmp_path: Path) -> None:
    wheel = tmp_path / "peer-1.whl"
    needed = ["regex", "torch==2.13.0+cpu; platform_machine == 'x86_64'", "torchaudio", "torch-extra>=1"]
    lines = [*needed, "opencv-python-headless>=4", 'pandas; extra == "bench"']
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("peer-1.dist-info/METADATA", "\n".join(f"Requires-Dist: {line}" for line in lines))
    assert vllm_requirements(wheel) == ["regex", "torch-extra>=1"]


def test_all_workloads_are_run_on_every_server_and_written_down(server: OpenAIServer, tmp_path: Path) -> None:
    options = Options(GROUPS, rounds=1, quick=True)
    servers = []
    with serving(OpenAIServer(text_only=True)) as other:
        for name, url, flags in (
            ("sfllm", server.url, {"workloads": GROUPS}),
            ("slow", other.url, {"workloads": ("W1", "W2"), "most_requests": 2}),
        ):
            contender = Contender(name, "bf16", ("serve",), extra_body='{"top_k": 1}', **flags)
            servers.append(Running(contender, url, os.getpid(), 1.5, 1.0))
        written = Written(tmp_path, [each.contender for each in servers])
        comparison = Comparison(options, SMOLLM2, MACHINE, written)
        for each in servers:
            comparison.add([each])
        text = comparison.run()
    rows = {(each.workload, each.server): each for each in comparison.rows}
    paced = next(name for name, _ in rows if name.startswith(PACED))
    alone = (*("W3", SATURATED, paced), *("1/40", "20/100", "40/40"))
    shared = [(name, each) for name in ("W1", "W2") for each in ("sfllm", "slow")]
    assert list(rows) == [*shared, *((name, "sfllm") for name in alone)]
    assert [rows["W1", name].output_tokens for name in ("sfllm", "slow")] == [3 * 128, 2 * 128]
    assert rows["W2", "sfllm"].output_tokens == 40 * 32
    assert rows["20/100", "sfllm"].output_tokens == 100 * 32
    assert rows["W2", "slow"].note == "2 of the 40 requests"
    assert all(each.failed == 0 and each.roofline_share > 0 for each in comparison.rows)
    assert text.splitlines()[-1].startswith("ratios: W1 bf16 ")
    assert all(request["top_k"] == 1 for request in other.requests if request["max_tokens"] > 1)
    document = json.loads((tmp_path / "peers.json").read_text())
    assert (document["complete"], len(document["rounds"])) == (True, 10)
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "peers.md").read_text().splitlines()[-1] == text.splitlines()[-1]


def test_a_server_that_is_gone_is_named_and_the_others_go_on(server: OpenAIServer, tmp_path: Path) -> None:
    with serving(OpenAIServer()) as other:
        gone = Running(Contender("gone", "bf16", ("serve",)), other.url, os.getpid(), 1.5, 1.0)
    here = Running(Contender("sfllm", "bf16", ("serve",)), server.url, os.getpid(), 1.5, 1.0)
    comparison = Comparison(Options(("W1", "W3"), 1, quick=True), SMOLLM2, MACHINE, Written(tmp_path, []))
    comparison.add([gone])
    comparison.add([here])
    text = comparison.run()
    assert [(each.workload, each.server) for each in comparison.rows] == [("W1", "sfllm"), ("W3", "sfllm")]
    assert text.count("gone did not answer before W1 and was left out since") == 1


def test_what_an_interrupted_run_measured_is_not_lost(
    server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(legs: Sequence[Leg], precisions: Mapping[str, str]) -> set[str]:
        if legs[-1].round == 3:
            raise RuntimeError("interrupted")
        return done_after(legs, precisions)

    monkeypatch.setattr("bench.peers.comparison.done_after", interrupt)
    comparison = Comparison(
        Options(("W1",), 3, quick=True, max_disturbance=99.0), SMOLLM2, MACHINE, Written(tmp_path, [])
    )
    comparison.add([Running(Contender("sfllm", "bf16", ("s",)), server.url, os.getpid(), 1.5, 1.0)])
    with pytest.raises(RuntimeError, match="interrupted"):
        comparison.run()
    document = json.loads((tmp_path / "peers.json").read_text())
    assert (document["complete"], document["rows"][0]["rounds"]) == (False, 2)
    assert "the run did not come to its end" in (tmp_path / "peers.md").read_text()


SERVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"data: {}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_up_when_it_answers_and_gone_afterwards(tmp_path: Path) -> None:
    contender = Contender("peer", "bf16", (sys.executable, "-c", SERVE, "{port}"))
    with running(contender, tmp_path) as server:
        assert server.start_seconds >= server.ready_seconds > 0
        assert server.is_alive()
        assert server.memory_bytes() > 2**20
    assert not server.is_alive()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_of_several_starts_the_last_one_runs_and_the_first_one_counts_apart(tmp_path: Path) -> None:
    contender = Contender("peer", "bf16", (sys.executable, "-c", SERVE, "{port}"))
    with contextlib.ExitStack() as stack:
        servers = started(contender, tmp_path, 2, stack)
        assert [each.is_alive() for each in servers] == [False, False, True]
    assert not servers[-1].is_alive()
    times = (4.0, 2.0, 1.0, 3.0)
    four = [servers[0]._replace(start_seconds=time, ready_seconds=time / 2) for time in times]
    assert start_of(four, 5) == Start("peer", 2.0, 4.0, 3, 1.0, 2.0, 5)
    assert start_of(four[:1], 5).warm_token is None


def test_a_server_that_ends_at_once_is_named_with_its_output(tmp_path: Path) -> None:
    contender = Contender("peer", "bf16", (sys.executable, "-c", "raise SystemExit('no such flag')"))
    with (
        pytest.raises(StartError, match=r"peer did not start; its output is in .*peer\.log"),
        running(contender, tmp_path),
    ):
        pass
    assert "no such flag" in (tmp_path / "peer.log").read_text()
