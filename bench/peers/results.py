"""The comparison as rows, and which of them are set against each other. Pure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.peers.contenders import OUR_SERVICES, OURS
from bench.peers.workloads import PACED, SATURATED

from sfllm_cli.bench.rounds import Leg, Result

UNQUANTIZED = "bf16"
BASELINE = "generate"


@dataclasses.dataclass(frozen=True)
class Row:
    """One server on one workload. Rates are medians over rounds, latencies in milliseconds.

    `services_cores` are those of gateway and scheduler together, NaN for other servers. `note` says
    what about the row is not like the others.
    """

    workload: str
    server: str
    precision: str
    rounds: int
    disturbed: int
    failed: float
    output_tokens: float
    tokens_per_second: float
    lowest: float
    highest: float
    requests_per_second: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    end_to_end_mean: float
    server_cores: float
    services_cores: float
    roofline_share: float
    note: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether it is a row of this project."""
        return is_ours(self.server)

    def to_json(self) -> dict[str, Any]:
        """Plain values, null where there is none."""
        values = dataclasses.asdict(self).items()
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values
        }


class Pair(NamedTuple):
    """Two rows of one workload that are set against each other, and in which regard."""

    regard: str
    own: Row
    other: Row

    @property
    def ratio(self) -> float:
        """Our output tokens a second as a multiple of the other's."""
        return self.own.tokens_per_second / self.other.tokens_per_second


def is_ours(server: str) -> bool:
    """Whether the server of that name is this project."""
    return server == OURS or server.startswith(f"{OURS}-")


def row(workload: str, precision: str, result: Result, floor_seconds: float, note: str = "") -> Row:
    """The row of a result whose workload takes at least `floor_seconds`."""
    figures, rates = result.figures, [leg.figures.output_tokens_per_second for leg in result.legs]
    return Row(
        workload=workload,
        server=result.server,
        precision=precision,
        rounds=len(result.legs),
        disturbed=sum(leg.disturbed for leg in result.legs),
        failed=figures.failed,
        output_tokens=figures.output_tokens,
        tokens_per_second=figures.output_tokens_per_second,
        lowest=min(rates),
        highest=max(rates),
        requests_per_second=figures.requests_per_second,
        ttft_p50=figures.ttft.p50 * 1000,
        ttft_p99=figures.ttft.p99 * 1000,
        itl_p50=figures.itl.p50 * 1000,
        itl_p99=figures.itl.p99 * 1000,
        end_to_end_mean=figures.end_to_end.mean * 1000,
        server_cores=statistics.median(leg.cpu.server for leg in result.legs),
        services_cores=statistics.median(map(_services_cores, result.legs)),
        roofline_share=floor_seconds / figures.seconds if figures.seconds else math.nan,
        note=note,
    )


def pairs(rows: Sequence[Row]) -> list[Pair]:
    """All that is compared: with the best peer at 16 bits and at any, with ourselves, with `generate`."""
    found = []
    for workload in dict.fromkeys(each.workload for each in rows):
        here = [each for each in rows if each.workload == workload and each.tokens_per_second > 0]
        plain, quantized = (
            _best([each for each in here if each.is_ours and (each.precision == UNQUANTIZED) is full], rows)
            for full in (True, False)
        )
        peers = [each for each in here if not each.is_ours]
        same = _best([each for each in peers if each.precision == UNQUANTIZED], rows)
        slowest = next((each for each in peers if each.server == BASELINE and each is not same), None)
        wanted = (
            (UNQUANTIZED, plain, same),
            ("best quantization", quantized, _best(peers, rows)),
            ("quantized to bf16", quantized, plain),
            ("baseline", plain, slowest),
        )
        found += [Pair(regard, own, other) for regard, own, other in wanted if own and other]
    return found


def _best(candidates: Sequence[Row], rows: Sequence[Row]) -> Row | None:
    """The one with the most tokens a second. At a set rate all have the same: there capacity counts."""
    capacity = {each.server: each.tokens_per_second for each in rows if each.workload == SATURATED}

    def rank(each: Row) -> float:
        own = each.tokens_per_second
        return capacity.get(each.server, own) if each.workload.startswith(PACED) else own

    return max(candidates, key=rank, default=None)


def _services_cores(leg: Leg) -> float:
    used = [cores for name, cores in leg.cpu.parts if name in OUR_SERVICES]
    return sum(used) if used else math.nan
