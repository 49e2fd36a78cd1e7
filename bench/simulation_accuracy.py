"""How well `sfllm simulate` predicts a stack that runs on this machine.

    sfllm serve --workers 2 --threads 1
    sfllm simulate --calibrate http://127.0.0.1:8081 --calibrate-workers 2 --profile-out profile.json
    python -m bench.simulation_accuracy --url http://127.0.0.1:8081 --workers 2 --profile profile.json

Each load is sent to the stack in rounds and simulated once, with the same requests: 40 at once with 16 to
512 tokens in and 128 out, and a made-up chat trace at a share of the throughput that the first load reached.
Prints both and their ratios; the exit code is 1 when throughput or median time to first token is off by more
than `--tolerance`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace
from rich.console import Console

from sfllm_cli.bench.command import benchmark, check
from sfllm_cli.bench.figures import median_figures
from sfllm_cli.bench.trace import Entry, chat_trace
from sfllm_cli.bench.workload import points, shapes
from sfllm_cli.bench_settings import BenchSettings
from sfllm_cli.simulate.command import simulate
from sfllm_cli.simulate.profiles import load_profile
from sfllm_cli.simulate_settings import SimulateSettings

AT_ONCE = 40
CHAT_REQUESTS = 60
CHAT_SHARE = 0.7
"""Of the throughput in tokens that 40 at once reached."""


class Pair(NamedTuple):
    """A load, measured and predicted: output tokens a second, and the median time to a first token."""

    name: str
    measured: tuple[float, float]
    predicted: tuple[float, float]

    @property
    def ratios(self) -> tuple[float, float]:
        """Predicted over measured."""
        (tokens, ttft), (own_tokens, own_ttft) = self.measured, self.predicted
        return own_tokens / tokens, own_ttft / ttft


def main(argv: Sequence[str]) -> int:
    """Measure, simulate, compare."""
    arguments = _parser().parse_args(argv)
    burst = BenchSettings(
        url=(arguments.url,),
        requests=AT_ONCE,
        concurrency=(AT_ONCE,),
        prompt_tokens="16:512",
        output_tokens="128",
        ignore_eos=True,
        rounds=arguments.rounds,
        max_repeats=arguments.max_repeats,
        quiet_seconds=arguments.quiet_seconds,
    )
    pairs = [_compare("40 at once", burst, None, arguments)]
    trace = chat_trace(CHAT_REQUESTS, random.Random(0))
    mean_output = sum(entry.output_tokens for entry in trace) / len(trace)
    rate = CHAT_SHARE * pairs[0].measured[0] / mean_output
    chat = replace(burst, requests=CHAT_REQUESTS, request_rate=(round(rate, 2),))
    pairs.append(_compare(f"chat trace at {rate:.2f}/s", chat, trace, arguments))
    for pair in pairs:
        (tokens, ttft), (own_tokens, own_ttft), (of_tokens, of_ttft) = (
            pair.measured,
            pair.predicted,
            pair.ratios,
        )
        print(f"{pair.name}: measured {tokens:.1f} output tokens/s, TTFT p50 {ttft * 1000:.0f} ms")
        print(f"  predicted {own_tokens:.1f} ({of_tokens:.2f}x), {own_ttft * 1000:.0f} ms ({of_ttft:.2f}x)")
    off = max(abs(ratio - 1.0) for pair in pairs for ratio in pair.ratios)
    print(f"largest error {off:.0%}")
    return 1 if off > arguments.tolerance else 0


def _compare(
    name: str, settings: BenchSettings, trace: Sequence[Entry] | None, arguments: argparse.Namespace
) -> Pair:
    _, legs = asyncio.run(benchmark(settings, check(settings), trace, Console(stderr=True)))
    measured = median_figures([leg.figures for leg in legs if leg.kept])
    entries = [
        Entry(shape.at, shape.prompt_tokens, shape.output_tokens)
        for shape in shapes(settings, points(settings)[0], settings.requests, trace)
    ]
    simulated, _ = simulate(
        SimulateSettings(
            workers=arguments.workers, requests=len(entries), max_tokens=0, gateways=1, link_ms=1.0
        ),
        load_profile(arguments.profile),
        arguments.policy,
        _rate(entries),
        entries,
    )
    return Pair(
        name,
        (measured.output_tokens_per_second, measured.ttft.p50),
        (simulated.output_tokens_per_second, simulated.ttft.p50),
    )


def _rate(entries: Sequence[Entry]) -> float:
    """The rate at which a trace comes as it is."""
    last = entries[-1].at
    return len(entries) / (last + last / (len(entries) - 1)) if last else float("inf")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulation_accuracy",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8081")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--profile", default="profile.json")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-repeats", type=int, default=3, help="of a round that others disturbed")
    parser.add_argument("--quiet-seconds", type=float, default=30.0, help="longest wait for others to rest")
    parser.add_argument("--tolerance", type=float, default=0.15)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
