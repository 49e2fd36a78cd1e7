"""From settings to the parts of a worker that has no model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from sfllm.asset_pull import asset_of
from sfllm.messages import ModelCard
from sfllm.settings import WorkerSettings
from sfllm_worker.assembly import Parts
from sfllm_worker.engine.planner import Limits
from sfllm_worker.mock.assets import assets
from sfllm_worker.mock.engine import MockEngine, Pace, Poison
from sfllm_worker.mock.tokens import EOS_TOKEN, VOCAB_SIZE

DEFAULT_NAME = "mock"
DEFAULT_BATCH_SIZE = 256
DEFAULT_CONTEXT_LENGTH = 8192
DEFAULT_KV_TOKENS = 1_000_000
DEFAULT_STEP_TOKENS = 512

SEGMENTATION_FAULT_CODE = 139
"""What a shell reports of a process that died of one, which is how native code ends a worker."""

STALL_SECONDS = 0.05
"""A stalled step sleeps in so short pieces, for a signal that comes just before a sleep waits for its end."""


def build(settings: WorkerSettings) -> Parts:
    """The parts of a mock worker, in no time."""
    batch_size = settings.max_batch_size or DEFAULT_BATCH_SIZE
    step_tokens = max(settings.max_step_tokens or DEFAULT_STEP_TOKENS, batch_size)
    limits = Limits(batch_size, step_tokens, settings.block_size)
    engine = MockEngine(
        limits,
        settings.max_running_tokens or DEFAULT_KV_TOKENS,
        settings.max_context_length or DEFAULT_CONTEXT_LENGTH,
        Pace(settings.mock_tokens_per_second, settings.mock_prefill_tokens_per_second),
        settings.mock_output_tokens,
        _poison(settings),
    )
    files = assets()
    names = settings.served_model_name or (DEFAULT_NAME,)
    card = ModelCard(
        name=names[0],
        aliases=tuple(names[1:]),
        root=DEFAULT_NAME,
        created=int(time.time()),
        max_model_len=engine.max_model_len,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS_TOKEN,),
        assets=tuple(asset_of(name, content) for name, content in sorted(files.items())),
    )
    return Parts(engine, card, files, limits.max_step_tokens, engine.longest_step_seconds())


def _poison(settings: WorkerSettings) -> Poison | None:
    if settings.mock_poison_token is None:
        return None
    strikes: dict[str, Callable[[], None]] = {"crash": _crash, "fail": _fail, "stall": _stall}
    return Poison(settings.mock_poison_token, strikes[settings.mock_poison])


def _crash() -> None:
    os._exit(SEGMENTATION_FAULT_CODE)


def _fail() -> None:
    raise RuntimeError("a poisoned prompt")


def _stall() -> None:
    while True:
        time.sleep(STALL_SECONDS)
