"""The plots of a simulation. Only this module of it knows matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import cycle

from matplotlib.figure import Figure

from sfllm_cli.simulate.figures import Figures
from sfllm_cli.simulate.report import Run

PANELS: tuple[tuple[str, Callable[[Figures], float]], ...] = (
    ("goodput, requests/s", lambda figures: figures.good_per_second),
    ("share of requests in target", lambda figures: figures.good_share),
    ("time to first token p50, s", lambda figures: figures.ttft.p50),
    ("time to first token p99, s", lambda figures: figures.ttft.p99),
)

STYLES = ("-", "--", "-.", ":")
"""Lines on top of each other can still be told apart."""


def draw(runs: Sequence[Run]) -> bytes:
    """A PNG: each figure over the rate of requests, a line for each policy."""
    policies = list(dict.fromkeys(run.policy for run in runs))
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for policy, style in zip(policies, cycle(STYLES)):
            own = sorted((run.rate, value(run.figures)) for run in runs if run.policy == policy)
            axes.plot([rate for rate, _ in own], [each for _, each in own], style, marker="o", label=policy)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("requests/s that come", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(policies, loc="outside lower center", ncols=len(policies))
    picture = io.BytesIO()
    # Without the name of the software and its version, so that the same results give the same file.
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    return picture.getvalue()
