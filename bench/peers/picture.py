"""The comparison as one picture: throughput relative to the best peer, and latencies below it."""

from __future__ import annotations

import io
from collections.abc import Sequence

from bench.peers.results import Row
from bench.peers.workloads import PACED
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

_GROUP = 0.84
"""The width of a group of bars; workloads are 1 apart."""
_OURS = ("#d1495b", "#f28f3b", "#f6c85f")
_PEERS = ("#1f4e79", "#2e75b6", "#7fb2e5", "#a9cdf0", "#5f6b7a", "#9aa5b1", "#c7ced6")


def draw(rows: Sequence[Row]) -> bytes:
    """A PNG: output tokens a second relative to the best peer, then TTFT and ITL, medians and p99."""
    workloads = list(dict.fromkeys(each.workload for each in rows))
    servers = list(dict.fromkeys(each.server for each in rows))
    figure = Figure(figsize=(12, 9.5), layout="constrained")
    top, *below = figure.subplots(3, 1, height_ratios=(1.3, 1, 1))
    loaded = [name for name in workloads if not name.startswith(PACED)]
    best = {name: _best_peer(rows, name) for name in loaded}
    _bars(top, rows, loaded, servers, "tokens_per_second", best)
    top.axhline(1, color="black", linewidth=0.8, linestyle="--")
    top.set_ylabel("output tokens/s\nrelative to the best peer")
    if top.containers:
        top.legend(ncols=min(len(servers), 5), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for axes, name in zip(below, ("ttft", "itl"), strict=True):
        _bars(axes, rows, workloads, servers, f"{name}_p50", dict.fromkeys(workloads, 1.0), f"{name}_p99")
        if axes.containers:
            axes.set_yscale("log")
        axes.set_ylabel(f"{name.upper()} ms, log scale\nbar: median, line: p99")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _bars(
    axes: Axes,
    rows: Sequence[Row],
    workloads: Sequence[str],
    servers: Sequence[str],
    name: str,
    units: dict[str, float],
    line: str = "",
) -> None:
    """A group of bars for each workload, as high as the values in the workload's unit, labelled with them.

    A second value is a line across the bar's place.
    """
    colours = _colours(rows, servers)
    width = _GROUP / max(1, len(servers))
    for each in rows:
        value = getattr(each, name)
        if each.workload not in workloads or not value > 0:
            continue
        unit, order = units[each.workload], servers.index(each.server)
        x = workloads.index(each.workload) - _GROUP / 2 + (order + 0.5) * width
        label = each.server if each.workload == _first_workload(rows, each.server) else None
        axes.bar(x, value / unit, width * 0.92, color=colours[each.server], label=label)
        if line:
            axes.plot(x, getattr(each, line) / unit, marker="_", markersize=8, color="black")
        # Above the bar, or within its top where a line may be above it; the outline is for dark bars.
        place = {"xytext": (0, -2), "va": "top"} if line else {"xytext": (0, 2), "va": "bottom"}
        axes.annotate(
            _short(value),
            (x, value / unit),
            textcoords="offset points",
            ha="center",
            fontsize=6.5,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            **place,
        )
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_xlim(-0.5, max(0.5, len(workloads) - 0.5))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(y=0.12)


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _colours(rows: Sequence[Row], servers: Sequence[str]) -> dict[str, str]:
    own = [name for name in servers if any(each.is_ours for each in rows if each.server == name)]
    others = [name for name in servers if name not in own]
    return {
        **{name: _OURS[index % len(_OURS)] for index, name in enumerate(own)},
        **{name: _PEERS[index % len(_PEERS)] for index, name in enumerate(others)},
    }


def _best_peer(rows: Sequence[Row], workload: str) -> float:
    """Tokens a second of the best peer; of the best of all where there is no peer."""
    here = [each for each in rows if each.workload == workload]
    peers = [each for each in here if not each.is_ours] or here
    return max((each.tokens_per_second for each in peers), default=1.0) or 1.0


def _first_workload(rows: Sequence[Row], server: str) -> str:
    return next(each.workload for each in rows if each.server == server)
