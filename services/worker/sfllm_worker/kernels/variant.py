"""One form of a kernel that the product launches, described so that it can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """A kernel with the types and constants of one kind of launch.

    `signature` gives each argument's type as triton spells it ("*bf16", "*i64", "i32", "fp32", or
    "constexpr" for those in `constants`). `aligned` are the arguments that launches find divisible by
    16, which a just-in-time compilation would notice by itself: pointers of tensors and most strides.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    min_capability: int = 80
    """The first architecture, as ten times its compute capability, that has the instructions."""
