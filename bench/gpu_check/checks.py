"""What a check is, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Check(NamedTuple):
    """Something to prove. `run` says what was found, or raises AssertionError with what is wrong.

    A check that takes longer than `seconds` has failed: it hangs, or waits for what will not come.
    """

    title: str
    run: Callable[[], str]
    needs_gpu: bool = False
    seconds: float = 150.0


class Setting(NamedTuple):
    """Where checks run. On a CPU the kernels are interpreted, so shapes are tiny there."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, device: str) -> Setting:
        """The formats that the device is to be proven in; the interpreter cannot do bfloat16 products."""
        if device == "cuda":
            return cls(torch.device("cuda", torch.cuda.current_device()), (torch.bfloat16, torch.float16))
        return cls(torch.device(device), (torch.float32, torch.float16))

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"


def name_of(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the expected value where that is above one. NaN is infinite."""
    difference = (actual.double().cpu() - expected.double().cpu()).abs()
    relative = difference / expected.double().cpu().abs().clamp(min=1.0)
    return float(torch.nan_to_num(relative, nan=torch.inf).max())


def within(actual: Tensor, expected: Tensor, tolerance: float) -> str:
    """The largest error as text; AssertionError when it is over the tolerance."""
    error = largest_error(actual, expected)
    assert error <= tolerance, f"largest error {error:.2e} is over {tolerance:.0e}"
    return f"largest error {error:.1e} (at most {tolerance:.0e})"


def noise_to_signal(actual: Tensor, expected: Tensor) -> float:
    """The root mean square of the difference over that of the expected values' spread, row by row."""
    wide = expected.double().cpu()
    spread = wide - wide.mean(-1, keepdim=True)
    difference = actual.double().cpu() - wide
    return float((difference.square().mean() / spread.square().mean()).sqrt())
