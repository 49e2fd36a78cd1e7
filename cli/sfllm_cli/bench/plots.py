"""The plots of a benchmark. The only module of the command line that knows matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sfllm_cli.bench.figures import Figures
from sfllm_cli.bench.rounds import Result
from sfllm_cli.bench.workload import Point

Value = Callable[[Figures], float]
BAR_GROUP_WIDTH = 0.8


class Panel(NamedTuple):
    """One plot: the values that are drawn in full, and others that are drawn pale."""

    title: str
    full: Value
    pale: Value


PANELS = (
    Panel(
        "output tokens/s; pale: all tokens/s",
        lambda figures: figures.output_tokens_per_second,
        lambda figures: figures.total_tokens_per_second,
    ),
    Panel(
        "goodput, requests/s; pale: all requests",
        lambda figures: figures.good_requests_per_second,
        lambda figures: figures.requests_per_second,
    ),
    Panel(
        "time to first token, ms: p50; pale: p99",
        lambda figures: figures.ttft.p50 * 1000,
        lambda figures: figures.ttft.p99 * 1000,
    ),
    Panel(
        "between arrivals, ms: p50; pale: p99",
        lambda figures: figures.itl.p50 * 1000,
        lambda figures: figures.itl.p99 * 1000,
    ),
)


def draw(results: Sequence[Result], form: Literal["png", "svg"]) -> bytes:
    """A picture with all panels: bars where there is one point of load, lines over several."""
    servers = list(dict.fromkeys(result.server for result in results))
    points = list(dict.fromkeys(result.point for result in results))
    found = {(result.server, result.point): result for result in results}
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for index, server in enumerate(servers):
            own = [found[server, point] for point in points if (server, point) in found]
            if len(points) > 1:
                _lines(axes, panel, own, f"C{index}", points)
            else:
                _bars(axes, panel, own[0], index)
        if len(points) == 1:
            axes.set_xticks(range(len(servers)), servers)
        axes.set_title(panel.title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
    if len(points) > 1:
        figure.legend(servers, loc="outside lower center", ncols=len(servers))
    else:
        figure.suptitle(points[0].label, fontsize=11)
    picture = io.BytesIO()
    # Without a date, so that the same results give the same file.
    figure.savefig(picture, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
    return picture.getvalue()


def _lines(axes: Axes, panel: Panel, own: Sequence[Result], colour: str, points: Sequence[Point]) -> None:
    places = [points.index(result.point) for result in own]
    axes.plot(places, [panel.full(result.figures) for result in own], color=colour, marker="o", zorder=3)
    axes.plot(places, [panel.pale(result.figures) for result in own], color=colour, alpha=0.35)
    # Each round too: the reader sees the spread that a median hides.
    for place, result in zip(places, own, strict=True):
        _dots(axes, panel, result, place)
    axes.set_xticks(range(len(points)), [point.label for point in points], fontsize=8)


def _bars(axes: Axes, panel: Panel, result: Result, place: int) -> None:
    axes.bar(place, _number(panel.pale(result.figures)), BAR_GROUP_WIDTH, color=f"C{place}", alpha=0.35)
    axes.bar(place, _number(panel.full(result.figures)), BAR_GROUP_WIDTH / 2, color=f"C{place}")
    _dots(axes, panel, result, place)


def _dots(axes: Axes, panel: Panel, result: Result, place: int) -> None:
    values = [panel.full(leg.figures) for leg in result.legs]
    axes.scatter([place] * len(values), values, s=8, color="black", alpha=0.5, zorder=4)


def _number(value: float) -> float:
    return 0.0 if math.isnan(value) else value
