"""The pure parts of the comparison with other servers: the roofline, the table, the ratios."""

from __future__ import annotations

import json
import math
import os
import sys
import zipfile
from pathlib import Path

import pytest
from bench.peers.comparison import Comparison, Options
from bench.peers.contenders import Contender
from bench.peers.install import vllm_requirements
from bench.peers.processes import Running, StartError, running
from bench.peers.results import Row, Start, draw, ratios, table
from bench.peers.roofline import Machine, ModelSize, Size, floor_seconds
from hypothesis import given
from hypothesis import strategies as st
from openai_server import OpenAIServer
from openai_server import running as serving

SMOLLM2 = ModelSize(30, 576, 9, 3, 64, 1536, 49152)
MACHINE = Machine(read_bytes=25e9, operations=2.3e12)


def test_the_default_model_has_as_many_weights_as_it_is_said_to_have() -> None:
    assert SMOLLM2.weights == pytest.approx(134.5e6, rel=0.001)
    assert SMOLLM2.cache_bytes_per_token == 23040


def test_a_long_answer_alone_takes_as_long_as_reading_all_weights_for_each_token() -> None:
    seconds = floor_seconds(MACHINE, SMOLLM2, "bf16", [Size(1, 0, 101)], 1)
    assert seconds / 100 == pytest.approx(SMOLLM2.weights * 2 / 25e9, rel=0.01)


def test_requests_at_once_share_the_reading_of_weights() -> None:
    requests = [Size(16, 0, 128)] * 40
    together = floor_seconds(MACHINE, SMOLLM2, "bf16", requests, 40)
    assert floor_seconds(MACHINE, SMOLLM2, "bf16", requests, 1) > 10 * together


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
    assert ratios(ROWS) == "ratios: W1 bf16 1.25x vllm; W2 bf16 0.50x vllm"
    assert ratios(ROWS[:1]) == "ratios: nothing to compare"


def test_quantized_servers_are_compared_with_each_other() -> None:
    quantized = [*ROWS, row("W1", "sfllm-int4", 180, "int4")]
    assert "W1 int4 1.20x llama.cpp-q4_1" in ratios(quantized)


def test_the_table_has_a_line_for_every_row_and_every_start() -> None:
    text = table(ROWS, [Start("sfllm", 2.5, 2**30)])
    assert "| W2 | vllm | bf16 | 600.0 (599.0 .. 601.0) |" in text
    assert "| sfllm | 2.5 s | 1.00 GiB |" in text
    assert ROWS[0].to_json()["itl_p50"] is None


def test_a_row_that_failed_or_was_disturbed_says_so() -> None:
    bad = Row(**{**ROWS[0].to_json(), "itl_p50": math.nan, "failed": 2, "disturbed": 1})
    assert "2 failed, 1 of 5 disturbed" in table([bad], [])


def test_the_picture_is_drawn_without_rounds_too() -> None:
    assert draw(ROWS, []).startswith(b"\x89PNG")


def test_only_what_the_server_loads_is_installed_for_vllm(tmp_path: Path) -> None:
    wheel = tmp_path / "peer-1.whl"
    needed = ["regex", "torch==2.13.0+cpu; platform_machine == 'x86_64'", "torchaudio", "torch-extra>=1"]
    lines = [*needed, "opencv-python-headless>=4", 'pandas; extra == "bench"']
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("peer-1.dist-info/METADATA", "\n".join(f"Requires-Dist: {line}" for line in lines))
    assert vllm_requirements(wheel) == ["regex", "torch-extra>=1"]


def test_all_workloads_are_run_on_every_server_and_written_down(server: OpenAIServer, tmp_path: Path) -> None:
    options = Options(("W1", "W2", "W3", "W4"), rounds=1, quick=True)
    comparison = Comparison(options, SMOLLM2, MACHINE)
    with serving(OpenAIServer(text_only=True)) as other:
        for name, url, flags in (("sfllm", server.url, {}), ("slow", other.url, {"workloads": ("W1",)})):
            contender = Contender(name, "bf16", ("serve",), extra_body='{"top_k": 1}', **flags)
            comparison.add(Running(contender, url, os.getpid(), 1.5))
        comparison.run()
        text = comparison.write(tmp_path, comparison.starts())
    names = [(each.workload, each.server) for each in comparison.rows]
    assert names[:4] == [("W1", "sfllm"), ("W1", "slow"), ("W2", "sfllm"), ("W3", "sfllm")]
    assert names[4] == ("W4 saturated", "sfllm")
    assert names[5][0].startswith("W4 at ")
    assert [each.output_tokens for each in comparison.rows[:4]] == [3 * 128, 3 * 128, 40 * 32, 16 * 32]
    assert all(each.failed == 0 and each.roofline_share > 0 for each in comparison.rows)
    assert text.splitlines()[-1].startswith("ratios: W1 bf16 ")
    assert all(request["top_k"] == 1 for request in other.requests)
    document = json.loads((tmp_path / "peers.json").read_text())
    assert len(document["rounds"]) == 6
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


SERVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
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
        assert server.start_seconds > 0
        assert server.memory_bytes() > 2**20
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_a_server_that_ends_at_once_is_named_with_its_output(tmp_path: Path) -> None:
    contender = Contender("peer", "bf16", (sys.executable, "-c", "raise SystemExit('no such flag')"))
    with (
        pytest.raises(StartError, match=r"peer did not start; its output is in .*peer\.log"),
        running(contender, tmp_path),
    ):
        pass
    assert "no such flag" in (tmp_path / "peer.log").read_text()
