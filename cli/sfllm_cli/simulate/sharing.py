"""How a step's prefill is shared among prompts, as `sfllm_worker.engine.planner` shares it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from sfllm_cli.simulate.work import Key, Work

_left = attrgetter("left")


def has_room(prompts: Sequence[Work], budget: int, *, shortest_first: bool) -> bool:
    """Whether one more prompt would have a part of a step of so many tokens.

    With `shortest_first` the oldest takes half of it at most.
    """
    left = sum(work.left for work in prompts)
    if prompts and shortest_first:
        left -= max(0, prompts[0].left - (budget - budget // 2))
    return left < budget


def share_out(prompts: Sequence[Work], budget: int, *, shortest_first: bool) -> list[tuple[Work, int]]:
    """How many tokens of each prompt, oldest first, are computed in a step of so many.

    With `shortest_first` half is for the oldest, the other half for those with at most half as much left,
    shortest first, and what is left over goes by age.
    """
    if not shortest_first or not prompts:
        return _in_order(prompts, budget)
    oldest = prompts[0]
    short = sorted((work for work in prompts if work.left * 2 <= oldest.left), key=_left)
    counts: dict[Key, int] = {}
    everybody = [(work, budget) for work in (*short, *prompts)]
    for work, most in [(oldest, budget - budget // 2), *everybody]:
        before = counts.get(work.key, 0)
        count = min(work.left - before, most, budget)
        if count > 0:
            counts[work.key] = before + count
            budget -= count
    return [(work, counts[work.key]) for work in prompts if work.key in counts]


def _in_order(prompts: Sequence[Work], budget: int) -> list[tuple[Work, int]]:
    chunks: list[tuple[Work, int]] = []
    for work in prompts:
        if budget < 1:
            break
        count = min(work.left, budget)
        chunks.append((work, count))
        budget -= count
    return chunks
