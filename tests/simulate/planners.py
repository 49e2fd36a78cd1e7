"""The real planner and the modelled engine side by side: the same requests, one step after the other."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from sfllm.batch_sizing import BatchSizing
from sfllm.messages import Sampling
from sfllm.prefixes import CHUNK_TOKENS
from sfllm_cli.simulate.engine import ModelledEngine
from sfllm_cli.simulate.profiles import Profile
from sfllm_cli.simulate.work import Work
from sfllm_worker.engine.planner import Limits, Planner
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.kv.block_pool import BlockPool


class Prompt(NamedTuple):
    """A request: when it comes (a number of steps), whose beginning it has, and how long it is."""

    at: int
    family: int
    shared_chunks: int
    own_tokens: int
    outputs: int


class Case(NamedTuple):
    """Prompts, and a worker with so many `blocks` of `block_size` tokens."""

    prompts: list[Prompt]
    blocks: int
    slots: int
    step_tokens: int
    shortest_first: bool
    target: float | None
    block_size: int = CHUNK_TOKENS
    per_context_token: float = 0.0


def profile(case: Case) -> Profile:
    """The worker of a case, for the model."""
    return Profile(
        source="a test",
        base_seconds=0.01,
        per_prefill_token=0.001,
        per_decode_row=0.002,
        per_context_token=case.per_context_token,
        slots=case.slots,
        kv_tokens=case.blocks * case.block_size,
        step_tokens=case.step_tokens,
        block_size=case.block_size,
        target_itl_seconds=case.target,
    )


def token(prompt: Prompt, number: int, position: int) -> int:
    """Token ids: equal where prompts begin alike, and nowhere else."""
    if position < prompt.shared_chunks * CHUNK_TOKENS:
        return 1 + prompt.family * 10_000 + position
    return 1_000_000 * (number + 1) + position


class RealPlanner:
    """The real planner, one step after the other, each read before the next is planned."""

    def __init__(self, case: Case) -> None:
        limits = Limits(case.slots, case.step_tokens, case.block_size)
        self.planner = Planner(limits, BlockPool(case.blocks + 1))
        self.planner.shortest_first = case.shortest_first
        self.case = case
        self.preempted = 0
        self._sequences: dict[Sequence, int] = {}
        if case.target is not None:
            self.planner.sizing = BatchSizing(case.target, case.slots)
            self.planner.sizing.follow(profile(case).curve, 0.0)

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence to advance."""
        return self.planner.has_work

    def add(self, number: int) -> None:
        """A request comes."""
        prompt = self.case.prompts[number]
        count = prompt.shared_chunks * CHUNK_TOKENS + prompt.own_tokens
        tokens = [token(prompt, number, position) for position in range(count)]
        sequence = Sequence(number, 0, tokens, count, Sampling(prompt.outputs, 0))
        self._sequences[sequence] = number
        self.planner.add(sequence)

    def step(self) -> tuple[set[int], dict[int, int], set[int]]:
        """Who decoded, how much of whose prompt was computed, and who ended."""
        plan = self.planner.plan()
        self.preempted += len(plan.preempted)
        rows = {sequence: count for sequence, count, _, _ in plan.rows if sequence not in plan.preempted}
        decoded = {
            self._sequences[each] for each in rows if each.remaining == 1 and each not in plan.admitted
        }
        chunks = {self._sequences[each]: count for each, count in rows.items()}
        self.planner.launch(plan)
        self.planner.settle(plan)
        ended = set()
        for sequence, _, _, completes in plan.rows:
            if completes:
                number = self._sequences[sequence]
                sequence.tokens.append(token(self.case.prompts[number], number, len(sequence.tokens)))
                if sequence.generated == self.case.prompts[number].outputs:
                    self.planner.remove(sequence)
                    ended.add(number)
        return decoded, {number: count for number, count in chunks.items() if number not in decoded}, ended


class Model:
    """The modelled engine; a run of equal steps is seen one step at a time."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.engine = ModelledEngine(profile(case))
        self.engine.shortest_first = case.shortest_first
        if self.engine.sizing is not None:
            self.engine.sizing.follow(profile(case).curve, 0.0)

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence to advance."""
        return self.engine.running + self.engine.waiting > 0

    @property
    def preempted(self) -> int:
        """How many were preempted so far."""
        return self.engine.preempted

    def add(self, number: int) -> None:
        """A request comes."""
        prompt = self.case.prompts[number]
        count = prompt.shared_chunks * CHUNK_TOKENS + prompt.own_tokens
        names = array(
            "Q",
            [
                token(prompt, number, (chunk + 1) * CHUNK_TOKENS - 1)
                for chunk in range((count + prompt.outputs) // CHUNK_TOKENS)
            ],
        )
        self.engine.add(Work((0, number), 0, count, prompt.outputs, memoryview(names)))

    def has_single_tokens(self) -> bool:
        """Whether one token of a prompt is left to compute."""
        return any(work.begun and work.ends_at < 0 and work.left == 1 for work in self.engine.works())

    def step(self) -> tuple[set[int], dict[int, int], set[int]]:
        """Who decoded, how much of whose prompt was computed, and who ended."""
        plan = self.engine.plan()
        if plan is None:
            return set(), {}, set()
        decoded = {work.key[1] for work in self.engine.works() if work.ends_at >= 0}
        assert len(decoded) == plan.rows
        _, finished = self.engine.complete(plan, 1)
        self.engine.check_integrity()
        chunks = {work.key[1]: count for work, count in plan.chunks}
        return decoded, chunks, {work.key[1] for work in finished}
