"""Engines that overlap, and plain ones to compare them with, over the fake model."""

from __future__ import annotations

import pytest
import torch
from fake_device import DelayedCache, DelayedRunner, DelayedSampler, FakeDevice, guard_blocks
from fake_model import LIMITS, MAX_MODEL_LEN, FakeRunner, TokenCache

from sfllm.messages import Sampling
from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.interface import StepResult
from sfllm_worker.engine.planner import Limits
from sfllm_worker.engine.sequence import Sequence

END_OF_TEXT = (7, 23, 41)
ENDLESS = {"ignore_eos": True, "max_tokens": 20}
CPU = torch.device("cpu")

Choice = tuple[object, int]


def plain_engine(blocks: int = 15, faults: bool = False) -> Engine:
    """An engine that reads each step before it launches the next."""
    cache = TokenCache(blocks + 1)
    return Engine(FakeRunner(cache, faults), cache, LIMITS, END_OF_TEXT, MAX_MODEL_LEN, CPU)  # type: ignore[arg-type]


def overlapped_engine(
    device: FakeDevice, blocks: int = 15, faults: bool = False, limits: Limits = LIMITS
) -> Engine:
    """An engine that launches a step ahead, on a device that works later."""
    cache = TokenCache(blocks + 1)
    engine = Engine(
        DelayedRunner(device, FakeRunner(cache, faults)),
        DelayedCache(device, cache),  # type: ignore[arg-type]  # tokens in the place of keys and values
        limits,
        END_OF_TEXT,
        MAX_MODEL_LEN,
        CPU,
        DelayedSampler(device),
        overlap=True,
    )

    def spoil(handed_out: list[int]) -> None:
        cache.slots[handed_out] = -1

    guard_blocks(engine, device, spoil)
    return engine


def sequence(key: object, tokens: list[int], forks: int = 0, **sampling: object) -> Sequence:
    """A sequence that decodes greedily unless told otherwise, with `forks` choices to branch off."""
    wanted = Sampling(**{"max_tokens": 12, "seed": hash(key), "temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return Sequence(key, 0, list(tokens), len(tokens), wanted, tuple(range(1, forks + 1)))


class Entry:
    """Log probabilities at one place. Sums of different shapes differ in the last bits."""

    def __init__(self, ids: list[int], values: list[float]) -> None:
        self.ids = ids
        self.values = values

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Entry)
            and self.ids == other.ids
            and self.values == pytest.approx(other.values, abs=1e-5, nan_ok=True)
        )

    __hash__ = None  # type: ignore[assignment]  # equal within a tolerance: not to be hashed


class Output:
    """What steps said, checked as it comes in."""

    def __init__(self) -> None:
        self.tokens: dict[Choice, list[int]] = {}
        self.ends: dict[Choice, tuple[str, int]] = {}
        self.logprobs: dict[Choice, list[Entry]] = {}
        self.preempted = 0
        self.prompt_logprobs: dict[object, dict[int, Entry]] = {}

    def take(self, result: StepResult) -> None:
        self.preempted += result.preempted
        for progress in result.progress:
            sequence = progress.sequence
            choice = (sequence.key, sequence.choice)
            assert choice not in self.ends, "it had ended"
            tokens = self.tokens.setdefault(choice, [])
            if progress.token is not None:
                tokens.append(progress.token)
                self.logprobs.setdefault(choice, []).append(
                    Entry(list(progress.logprobs.ids), list(progress.logprobs.values))
                )
                assert sequence.tokens[sequence.prompt_count :] == tokens, "a token is read twice or never"
            if progress.finish is not None:
                self.ends[choice] = (progress.finish, progress.stop_token_id)
        for report in result.prompt_reports:
            width, ids, values = report.logprobs
            known = self.prompt_logprobs.setdefault(report.sequence.key, {})
            for index in range(len(ids) // width):
                part = slice(index * width, (index + 1) * width)
                assert report.start + index not in known, "it is reported twice"
                known[report.start + index] = Entry(list(ids[part]), list(values[part]))


def finish(engine: Engine, output: Output | None = None) -> Output:
    """Step to the end; then every block is free."""
    output = output or Output()
    steps = 0
    while engine.has_work:
        output.take(engine.step())
        engine.check_integrity()
        steps += 1
        assert steps < 3000, "the engine never comes to rest"
    assert engine.free_kv_tokens == engine.kv_tokens
    return output
