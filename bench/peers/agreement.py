"""Whether `sfllm bench` agrees with another load tool: `python -m bench.peers.agreement`.

Both measure the same server under the same load, in turns. The server is `sfllm serve --mock`, whose
tokens come at a set rate, so that a heavier client does not slow it down; or any other with `--url`.
The last line is the largest difference between the tools' medians.

Requests are sent at a constant rate. In a closed loop the tools would differ although both are right: a
server that works in steps lets a request wait for the next one, so a tool that is late in sending after an
answer ended sees a TTFT that is shorter by as much.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench.peers.contenders import Contender
from bench.peers.install import Installer, InstallError
from bench.peers.models import Models
from bench.peers.processes import StartError, end_on_terminate, running
from rich.console import Console

from sfllm.model_files import cache_directory
from sfllm_cli.bench.command import Target, benchmark
from sfllm_cli.bench.cpu import server_roots
from sfllm_cli.bench.trace import Entry
from sfllm_cli.bench_settings import BenchSettings
from sfllm_cli.errors import CommandError
from sfllm_cli.settings import ClientSettings

TOOL_SECONDS = 1800.0


class Measured(NamedTuple):
    """What both tools report: tokens of a prompt as the server counts them, milliseconds, tokens a second."""

    prompt_tokens: float
    ttft_p50: float
    ttft_mean: float
    tpot_p50: float
    tpot_mean: float
    end_to_end_p50: float
    end_to_end_mean: float
    tokens_per_second: float


def main() -> int:
    """Compare the tools; 1 when they differ by more than `--within`."""
    arguments = _arguments()
    end_on_terminate()
    tool = Installer(arguments.cache).guidellm() / "bin" / "guidellm"
    models = Models.prepare(arguments.cache)
    sfllm = str(Path(sys.executable).with_name("sfllm"))
    command = (sfllm, "serve", "--mock", "--model", str(models.directory), "--served-model-name", "m")
    mock = Contender("mock", "none", (*command, "--port", "{port}"))
    with contextlib.ExitStack() as stack:
        logs = arguments.cache / "logs"
        logs.mkdir(exist_ok=True)
        url = arguments.url or stack.enter_context(running(mock, logs)).url
        ours, theirs = [], []
        prompt_tokens = arguments.prompt_tokens
        # The first turn warms up both and is not counted. It shows how long each tool's words are to the
        # server, so that from then on both send prompts of the same length.
        for number in range(arguments.rounds + 1):
            ours.append(_sfllm(arguments, url, prompt_tokens, number))
            theirs.append(_guidellm(arguments, url, tool, models.directory, number))
            if number == 0:
                prompt_tokens = round(prompt_tokens * theirs[0].prompt_tokens / ours[0].prompt_tokens)
            print(f"round {number}: sfllm {ours[-1]}\n         guidellm {theirs[-1]}", flush=True)
    return _compare(ours[1:], theirs[1:], arguments.within)


def _compare(ours: list[Measured], theirs: list[Measured], within: float) -> int:
    print(f"\n| median of {len(ours)} rounds | sfllm bench | guidellm | difference |\n|---|---|---|---|")
    largest = 0.0
    for name in Measured._fields:
        mine, other = (statistics.median(getattr(each, name) for each in side) for side in (ours, theirs))
        difference = mine / other - 1
        largest = max(largest, abs(difference))
        print(f"| {name} | {mine:.2f} | {other:.2f} | {difference:+.1%} |")
    print(f"largest difference: {largest:.1%}")
    return 1 if largest > within else 0


def _sfllm(arguments: argparse.Namespace, url: str, prompt_tokens: int, seed: int) -> Measured:
    settings = BenchSettings(requests=arguments.requests, trace="constant rate", ignore_eos=True, seed=seed)
    trace = [
        Entry(number / arguments.rate, prompt_tokens, arguments.output_tokens)
        for number in range(arguments.requests)
    ]
    target = Target(ClientSettings(url=url, model=arguments.model), settings, server_roots(url))
    _, legs = asyncio.run(benchmark(settings, {"server": target}, trace, Console(stderr=True)))
    figures = legs[0].figures
    ttft, tpot, end_to_end = figures.ttft, figures.tpot, figures.end_to_end
    return Measured(
        figures.prompt_tokens / figures.completed,
        ttft.p50 * 1000,
        ttft.mean * 1000,
        tpot.p50 * 1000,
        tpot.mean * 1000,
        end_to_end.p50 * 1000,
        end_to_end.mean * 1000,
        figures.output_tokens_per_second,
    )


def _guidellm(arguments: argparse.Namespace, url: str, tool: Path, tokenizer: Path, seed: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        backend = f"target={url},model={arguments.model},request_format=/v1/completions,http2=false"
        sizes = f"prompt_tokens={arguments.prompt_tokens},output_tokens={arguments.output_tokens}"
        command = (
            *(str(tool), "run", "--disable-console"),
            *("--backend", f"kind=openai_http,{backend}"),
            *("--profile", f"kind=constant,rate={arguments.rate}"),
            *("--constraint", f"kind=max_requests,count={arguments.requests}"),
            *("--data", f"kind=synthetic_text,{sizes}"),
            *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
            *("--seed", f"kind=static,value={seed}", "--output", f"kind=json,path={report}"),
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=environment, timeout=TOOL_SECONDS, stdout=sys.stderr)
        metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]

    def of(name: str, part: str, factor: float = 1.0) -> float:
        return float(metrics[name]["successful"][part]) * factor

    # What it calls the time per output token includes the first one; its inter-token latency is our TPOT.
    return Measured(
        of("prompt_token_count", "mean"),
        of("time_to_first_token_ms", "median"),
        of("time_to_first_token_ms", "mean"),
        of("inter_token_latency_ms", "median"),
        of("inter_token_latency_ms", "mean"),
        of("request_latency", "median", 1000),
        of("request_latency", "mean", 1000),
        of("output_tokens_per_second", "mean"),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers.agreement", description=__doc__)
    add = parser.add_argument
    add("--url", help="a server that runs; a mock of ours is started if unset")
    add("--model", default="m", help="its name of the model")
    add("--rounds", type=int, default=5, help="counted turns of each tool")
    add("--requests", type=int, default=60)
    # No multiple of the mock's 20 ms a step: requests come at all moments of a step.
    add("--rate", type=float, default=3.1, help="requests a second")
    add("--prompt-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=64)
    add("--within", type=float, default=0.05, help="largest difference that is agreement")
    add("--cache", type=Path, default=cache_directory() / "peers", help="where the tool is installed")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CommandError, InstallError, StartError) as error:
        sys.exit(f"agreement: {error}")
