"""`python -m bench.link_encryption`: what CURVE on the links costs, in CPU time a token of each service.

A gateway, a scheduler and a mock worker, whose steps take 5 ms of waiting, answer streams over HTTP with and
without keys in turns. Judged is the CPU time of each process, all threads together, and the median over
rounds of the ratio of two neighbours, so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from sfllm.link_keys import key_file, make_link_keys

from .scheduler_load.process import _free_port

SERVICES = {"scheduler": ("gateway", "worker", "asset"), "worker": ("worker", "asset")}
SERVICES["gateway"] = ("gateway", "asset")
START_SECONDS, STOP_SECONDS = 60.0, 15.0
MOCK = ["--mock", "--mock-tokens-per-second=200", "--served-model-name=m"]
"""At the default of 50 a run takes four times as long, nearly all of it waiting."""


class Stack(NamedTuple):
    """A running gateway, scheduler and worker."""

    port: int
    processes: dict[str, psutil.Process]

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time of each service so far."""
        times = {name: process.cpu_times() for name, process in self.processes.items()}
        return {name: float(used.user + used.system) for name, used in times.items()}

    def stream(self, tokens: int) -> None:
        """One streamed completion to its end. Raises OSError when it is refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)
        body = {"model": "m", "prompt": "hi", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            if answer.status != http.client.OK or b"[DONE]" not in answer.read():
                raise OSError(f"status {answer.status}")
        finally:
            connection.close()


@contextmanager
def running_stack(keys: Path | None) -> Iterator[Stack]:
    """The three services on free ports, ready to answer."""
    ports = {name: _free_port() for name in ("gateway", "worker", "asset", "http")}
    with ExitStack() as stack:
        processes = {}
        for service, links in SERVICES.items():
            command = [sys.executable, "-m", f"sfllm_{service}", "--log-level=error"]
            command += [f"--{link}-address=tcp://127.0.0.1:{ports[link]}" for link in links]
            command += MOCK if service == "worker" else []
            command += [f"--port={ports['http']}"] if service == "gateway" else []
            command += [] if keys is None else [f"--link-keys={key_file(keys, service)}"]
            process = subprocess.Popen(command)
            stack.callback(process.wait, STOP_SECONDS)
            stack.callback(process.terminate)
            processes[service] = psutil.Process(process.pid)
        made = Stack(ports["http"], processes)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                made.stream(1)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield made


def measure(stack: Stack, streams: int, tokens: int) -> dict[str, float]:
    """Microseconds of CPU a token, of each service and of all."""
    before = stack.cpu_seconds()
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(stack.stream, [tokens] * streams))
    after = stack.cpu_seconds()
    each = {name: (after[name] - before[name]) * 1e6 / (streams * tokens) for name in before}
    return {**each, "all": sum(each.values())}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=30_000, help="of a round and a case")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stacks:
        make_link_keys(Path(folder))
        plain = stacks.enter_context(running_stack(None))
        curve = stacks.enter_context(running_stack(Path(folder)))
        print("| streams | CPU of | without keys, us/token | with keys | ratio | lowest to highest |")
        print("|---|---|---|---|---|---|")
        for streams in options.streams:
            tokens = max(1, options.tokens // streams) if streams > 1 else options.tokens // 10
            pairs = []
            for turn in range(options.rounds):
                order = (plain, curve) if turn % 2 else (curve, plain)
                found = [measure(stack, streams, tokens) for stack in order]
                pairs.append(found if turn % 2 else found[::-1])
            for name in (*SERVICES, "all"):
                ratios = [encrypted[name] / bare[name] for bare, encrypted in pairs]
                print(
                    f"| {streams} | {name} | {statistics.median(bare[name] for bare, _ in pairs):.1f} "
                    f"| {statistics.median(encrypted[name] for _, encrypted in pairs):.1f} "
                    f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
