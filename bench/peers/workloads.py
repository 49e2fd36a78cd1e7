"""The workloads of the comparison, as settings of the load tool."""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from sfllm_cli.bench_settings import BenchSettings

TIMEOUT_SECONDS = 3600.0
LATENCY_SHARE = 0.8
"""W4's latencies are taken at this share of the best peer's capacity."""

_COMMON = BenchSettings(ignore_eos=True, fresh_connections=True, timeout_seconds=TIMEOUT_SECONDS)


class Workload(NamedTuple):
    """A load under the name that tables use. Servers are asked by `group`, such as W4."""

    name: str
    group: str
    title: str
    settings: BenchSettings


def closed_workloads(quick: bool) -> list[Workload]:
    """W1 to W3, and the saturated part of W4. Quick ones send less and are not to be quoted."""
    return [
        Workload(
            "W1",
            "W1",
            "one at a time, 128 in, 128 out",
            replace(
                _COMMON,
                requests=3 if quick else 8,
                concurrency=(1,),
                prompt_tokens="128",
                output_tokens="128",
            ),
        ),
        Workload(
            "W2",
            "W2",
            "40 at once, 16..512 in, 128 out",
            replace(
                _COMMON,
                requests=40,
                concurrency=(40,),
                prompt_tokens="16:512",
                output_tokens="32" if quick else "128",
            ),
        ),
        Workload(
            "W3",
            "W3",
            "16 at once over a shared prefix of 512, 32 more in, 32 out",
            replace(
                _COMMON,
                requests=16 if quick else 48,
                concurrency=(16,),
                prefix_tokens=512,
                prompt_tokens="32",
                output_tokens="32",
            ),
        ),
        Workload(
            "W4 saturated",
            "W4",
            "a chat trace, all at once",
            replace(
                _COMMON,
                requests=_trace_requests(quick),
                trace="chat",
                request_rate=(float("inf"),),
            ),
        ),
    ]


def paced_workload(quick: bool, capacity: float) -> Workload:
    """W4 at a share of `capacity`, the requests a second of the best peer."""
    rate = capacity * LATENCY_SHARE
    return Workload(
        f"W4 at {rate:.2f}/s",
        "W4",
        f"a chat trace at {LATENCY_SHARE:.0%} of the best peer's capacity",
        replace(_COMMON, requests=_trace_requests(quick), trace="chat", request_rate=(rate,)),
    )


def _trace_requests(quick: bool) -> int:
    return 16 if quick else 64
