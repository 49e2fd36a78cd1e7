"""The model that the simulated workers serve, and what its answers truly are."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

from sfllm.messages import ModelCard
from sfllm.token_batch import NO_LOGPROBS, Logprobs
from sfllm_worker.engine.interface import Progress, StepResult
from sfllm_worker.engine.planned import PlannedEngine
from sfllm_worker.engine.planner import Limits

from .script import Open

MODEL = "m"
VOCAB_SIZE = 1000
EOS = 2
MAX_MODEL_LEN = 128
BLOCK_TOKENS = 8
STEP_TOKENS = 32

CARD = ModelCard(MODEL, (), MODEL, 0, MAX_MODEL_LEN, VOCAB_SIZE, (EOS,), ())


class BrokenStep(Exception):  # noqa: N818
    """What a step of a broken engine raises. `kills`: nothing of the process is left."""

    def __init__(self, kills: bool) -> None:
        super().__init__("the engine broke")
        self.kills = kills


class Ending(NamedTuple):
    """All tokens of a choice, and why there are no more."""

    tokens: list[int]
    reason: str


def prompt_tokens(asked: Open) -> list[int]:
    """Prompts share beginnings, so that the prefix cache has something to find."""
    return [3 + position % 7 for position in range(asked.prompt - 1)] + [10 + asked.request]


def _token(seed: int, choice: int, position: int) -> int:
    value = int.from_bytes(blake2b(f"{seed} {choice} {position}".encode(), digest_size=4).digest(), "little")
    return EOS if value % 40 == 0 else 3 + value % (VOCAB_SIZE - 3)


def true_endings(asked: Open) -> list[Ending]:
    """What each choice's answer is when nothing goes wrong, and must be when something does."""
    return [_true_ending(asked, choice) for choice in range(asked.n)]


def _true_ending(asked: Open, choice: int) -> Ending:
    tokens: list[int] = []
    while len(tokens) < asked.tokens:
        token = _token(asked.request, choice, len(tokens))
        if token == EOS:
            return Ending(tokens, "stop")
        tokens.append(token)
    return Ending(tokens, "length")


class SimulatedEngine(PlannedEngine):
    """An engine whose tokens are known beforehand. `poison` maps seeds to (token, kills)."""

    def __init__(self, limits: Limits, num_blocks: int, poison: Mapping[int, tuple[int, bool]]) -> None:
        super().__init__(limits, num_blocks, (EOS,), MAX_MODEL_LEN)
        self._poison = poison
        self.usable_kv_tokens = self.free_kv_tokens

    def step(self) -> StepResult:
        plan = self.planner.plan()
        targets = [row.sequence for row in plan.rows if row.completes]
        for sequence in targets:
            poison = self._poison.get(sequence.sampling.seed)
            if poison is not None and sequence.generated == poison[0]:
                raise BrokenStep(poison[1])
        self.planner.commit(plan)
        progress = []
        for target in targets:
            for branch in self._branches(target):
                token = _token(branch.sampling.seed, branch.choice, branch.generated)
                width = branch.sampling.logprobs + 1
                logprobs = Logprobs(width, [token] * width, [-1.0] * width) if width else NO_LOGPROBS
                progress.append(self._advance_by(branch, token, logprobs))
        return StepResult(progress, [], plan.admitted, len(plan.preempted), sum(r.num_tokens for r in plan.rows))


def make_engine(slots: int, kv_tokens: int, poison: Mapping[int, tuple[int, bool]]) -> SimulatedEngine:
    """An engine with room for so many sequences and tokens."""
    limits = Limits(slots, max(STEP_TOKENS, slots), BLOCK_TOKENS)
    return SimulatedEngine(limits, kv_tokens // BLOCK_TOKENS + 1, poison)
