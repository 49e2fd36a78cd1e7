"""What a simulated worker is: its capacity and what its steps take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from sfllm.messages import Capacity
from sfllm.prefixes import CHUNK_TOKENS
from sfllm.step_curve import StepCurve
from sfllm_cli.errors import CommandError


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kind of worker. `source` says where the figures come from.

    `block_size` is 2, 4, ... 64 tokens, `kv_tokens` are rounded down to whole blocks.
    With `target_itl_seconds` it takes in no more prefill beside decodes than keeps a step within that.
    """

    source: str
    base_seconds: float
    per_prefill_token: float
    per_decode_row: float
    per_context_token: float
    slots: int
    kv_tokens: int
    step_tokens: int
    block_size: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_TOKENS)] = 32
    max_model_len: int = 32768
    target_itl_seconds: float | None = None

    @property
    def curve(self) -> StepCurve:
        """What its steps take."""
        return StepCurve(
            self.base_seconds, self.per_prefill_token, self.per_decode_row, self.per_context_token
        )

    @property
    def capacity(self) -> Capacity:
        """What it tells the scheduler that it holds."""
        return Capacity(self.slots, self.kv_blocks * self.block_size, self.step_tokens)

    @property
    def kv_blocks(self) -> int:
        """Blocks of its cache."""
        return self.kv_tokens // self.block_size

    def request_seconds(self, prompt_tokens: float, output_tokens: float) -> float:
        """About how long a worker that is full is kept by one request: its share of all steps.

        Steps are taken to be filled with decode rows, as many as slots and cache allow, and a share of the
        prefill that keeps up with them.
        """
        rows = min(self.slots, self.kv_tokens / (prompt_tokens + output_tokens))
        context = rows * (prompt_tokens + output_tokens / 2)
        decode = self.base_seconds + self.per_decode_row * rows + self.per_context_token * context
        return prompt_tokens * self.per_prefill_token + output_tokens * decode / rows


PRESETS = {
    "cpu": Profile(
        source="a guess: SmolLM2-135M in bfloat16 on one core of a small server; --calibrate measures yours",
        base_seconds=0.008,
        per_prefill_token=0.00035,
        per_decode_row=0.00055,
        per_context_token=4e-7,
        slots=64,
        kv_tokens=60_000,
        step_tokens=512,
        max_model_len=8192,
    ),
    # 8.0e9 parameters in two bytes over 3.0 TB/s; 2 x 8.0e9 operations a token at half of 990 TFLOP/s; a row
    # of decode costs the same operations; 131,072 bytes of keys and values a token over 3.0 TB/s.
    "gpu": Profile(
        source="computed, not measured: an 8B model in bfloat16 on one H100, from its bandwidth and peak",
        base_seconds=0.0055,
        per_prefill_token=3.2e-5,
        per_decode_row=3.2e-5,
        per_context_token=4.4e-8,
        slots=256,
        kv_tokens=400_000,
        step_tokens=2048,
        max_model_len=32768,
    ),
}


def load_profile(name: str) -> Profile:
    """A preset, or what `--calibrate` wrote to a file. Raises `CommandError`."""
    if name in PRESETS:
        return PRESETS[name]
    try:
        profile = msgspec.json.decode(Path(name).read_bytes(), type=Profile)
    except OSError as error:
        presets = ", ".join(PRESETS)
        raise CommandError(f"--profile {name}: {error.strerror}; presets are {presets}") from error
    except msgspec.MsgspecError as error:
        raise CommandError(f"{name} is no profile: {error}") from error
    if CHUNK_TOKENS % profile.block_size:
        raise CommandError(f"{name} is no profile: its block_size does not divide {CHUNK_TOKENS}")
    return profile
