"""The modelled engine beside the real planner, over requests that come at random for a thousand steps.

Prompts that begin like no other: both take the same steps, as long as nobody is preempted or blocks are as
long as the chunks by which the model finds prefixes. With shared beginnings every request ends in the same
step or a few beside it, and where there is a target for the time between tokens, within `OFF_WITH_TARGET`.
What makes the difference: a worker finds a prefix in blocks of 16 or 32 tokens, the model in chunks of 64; of
two sequences that computed the same block both have their own in a worker, and one in the model; the last
token of a prompt, when it is left alone, is a decode to the planner and prefill to the model; and the
planner counts the token that a decode is about to add.
"""

from __future__ import annotations

import random
from statistics import median
from typing import NamedTuple

import pytest
from planners import Case, Model, Prompt, RealPlanner

Step = tuple[dict[int, int], set[int]]
"""Who gets how many tokens computed, of a prompt or as a decode, and who ends."""

REQUESTS = 150
SLOTS, STEP_TOKENS = 16, 256
STEPS_BETWEEN = 8.0
TIGHT, ROOMY = 60 * 64, 400 * 64
"""Tokens in the cache: with the first a few are preempted, with the second nobody is."""


class Off(NamedTuple):
    """How far a run may be off: its length, as a share of it, and the end of a request, in steps."""

    length: float
    median: int
    most: int


OFF, OFF_WITH_TARGET = Off(0.001, 0, 8), Off(0.01, 15, 40)


def prompts(seed: int, *, alike: bool) -> list[Prompt]:
    """Poisson arrivals of lengths like those of chats; `alike` ones share up to four chunks with others."""
    chance = random.Random(seed)
    at = 0.0
    made = []
    for _ in range(REQUESTS):
        shared = chance.randint(0, 4)
        own = min(1500, 2 + int(chance.lognormvariate(4.8, 1.0)))
        outputs = 1 + int(chance.expovariate(1 / 60))
        made.append(Prompt(int(at), chance.randrange(3), shared if alike else 0, own, outputs))
        at += chance.expovariate(1 / STEPS_BETWEEN)
    return made


def steps_of(engine: RealPlanner | Model) -> list[Step]:
    """Every step until all requests have ended."""
    asked = engine.case.prompts
    taken: list[Step] = []
    came, left = 0, set(range(len(asked)))
    while left:
        while came < len(asked) and asked[came].at <= len(taken):
            engine.add(came)
            came += 1
        decoded, chunks, ended = engine.step() if engine.has_work else (set(), {}, set())
        taken.append((dict.fromkeys(decoded, 1) | chunks, ended))
        left -= ended
    return taken


def ends(steps: list[Step]) -> dict[int, int]:
    return {number: place for place, step in enumerate(steps) for number in step[1]}


@pytest.mark.parametrize("shortest_first", [False, True])
@pytest.mark.parametrize(
    ("tokens", "block_size"),
    [(ROOMY, 16), (ROOMY, 32), (TIGHT, 64)],
)
def test_the_steps_are_the_same(shortest_first: bool, tokens: int, block_size: int) -> None:
    for seed in range(3):
        asked = prompts(seed, alike=False)
        blocks = tokens // block_size
        case = Case(asked, blocks, SLOTS, STEP_TOKENS, shortest_first, None, block_size)
        real, model = RealPlanner(case), Model(case)
        expected, found = steps_of(real), steps_of(model)
        # Not one comparison of all: what it would say of a difference takes minutes to make.
        assert len(found) == len(expected)
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert pair[0] == pair[1], f"step {number} of seed {seed}"
        assert real.preempted == model.preempted


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("shortest_first", [False, True])
@pytest.mark.parametrize(("target", "bound"), [(None, OFF), (0.06, OFF_WITH_TARGET)])
def test_where_prefixes_and_targets_differ_the_difference_is_bounded(
    block_size: int, shortest_first: bool, target: float | None, bound: Off
) -> None:
    for seed in range(2):
        asked = prompts(seed, alike=True)
        blocks = TIGHT // block_size
        case = Case(asked, blocks, SLOTS, STEP_TOKENS, shortest_first, target, block_size, 1e-6)
        real, model = steps_of(RealPlanner(case)), steps_of(Model(case))
        assert len(model) == pytest.approx(len(real), rel=bound.length)
        expected, found = ends(real), ends(model)
        off = [abs(found[number] - expected[number]) for number in expected]
        assert median(off) <= bound.median
        assert max(off) <= bound.most
