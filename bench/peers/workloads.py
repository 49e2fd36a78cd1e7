"""The workloads of the comparison, as settings of the load tool."""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from sfllm_cli.bench_settings import BenchSettings

TIMEOUT_SECONDS = 600.0
LATENCY_SHARE = 0.8
"""W4's latencies are taken at this share of the best peer's capacity."""
GROUPS = ("W1", "W2", "W3", "W4", "seed")
SATURATED = "W4 saturated"
PACED = "W4 at "
"""How the name of W4 at a set rate begins."""
SEED_ROUNDS = 3

_COMMON = BenchSettings(ignore_eos=True, fresh_connections=True, timeout_seconds=TIMEOUT_SECONDS)
_SEED_LOADS = ((1, 40), (20, 100), (40, 40))


class Workload(NamedTuple):
    """A load under the name that tables use. Servers are asked by `group`, such as W4."""

    name: str
    group: str
    title: str
    settings: BenchSettings


def closed_workloads(quick: bool) -> list[Workload]:
    """W1 to W3, and the saturated part of W4. Quick ones send less and are not to be quoted."""
    alone = replace(_COMMON, concurrency=(1,), prompt_tokens="128", output_tokens="128")
    prefixed = replace(_COMMON, concurrency=(16,), prefix_tokens=512, prompt_tokens="32", output_tokens="32")
    chat = replace(_COMMON, trace="chat", request_rate=(float("inf"),))
    return [
        Workload("W1", "W1", "one at a time, 128 in, 128 out", replace(alone, requests=3 if quick else 8)),
        Workload("W2", "W2", "40 at once, 16..512 in, 128 out", _mixed(40, 40, quick)),
        Workload(
            "W3",
            "W3",
            "16 at once over a shared prefix of 512, 32 more in, 32 out",
            replace(prefixed, requests=16 if quick else 48),
        ),
        Workload(
            SATURATED, "W4", "a chat trace, all at once", replace(chat, requests=_trace_requests(quick))
        ),
    ]


def paced_workload(quick: bool, capacity: float) -> Workload:
    """W4 at a share of `capacity`, the requests a second of the best peer."""
    rate = capacity * LATENCY_SHARE
    return Workload(
        f"{PACED}{rate:.2f}/s",
        "W4",
        f"a chat trace at {LATENCY_SHARE:.0%} of the best peer's capacity",
        replace(_COMMON, requests=_trace_requests(quick), trace="chat", request_rate=(rate,)),
    )


def seed_workloads(quick: bool) -> list[Workload]:
    """The loads of the table that this project began with: users at once, and requests in all."""
    return [
        Workload(
            f"{users}/{requests}",
            "seed",
            f"{requests} requests, {users} at once, 16..512 in, 128 out",
            # Prompts of their own: those of W1 and W2 may still be in a prefix cache.
            replace(_mixed(users, requests, quick), seed=number),
        )
        for number, (users, requests) in enumerate(_SEED_LOADS, start=1)
    ]


def _mixed(users: int, requests: int, quick: bool) -> BenchSettings:
    return replace(
        _COMMON,
        requests=requests,
        concurrency=(users,),
        prompt_tokens="16:512",
        output_tokens="32" if quick else "128",
    )


def _trace_requests(quick: bool) -> int:
    return 16 if quick else 40
