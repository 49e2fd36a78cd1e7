"""Which weights are quantized, and to how many bits."""

from __future__ import annotations

from collections.abc import Mapping

BITS: Mapping[str, int | None] = {"none": None, "int8": 8, "int4": 4, "fp8": 8}
"""Bits of the layers' weights by the name of the setting."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HEAD_BITS = 8
"""Errors of the head go into the logits as they are; those of layers are spread over many sums."""


def bits_of(name: str, bits: int | None, *, tied: bool) -> int | None:
    """The bits for the weight of that Hugging Face name when layers get `bits`; None: it stays as it is.

    All products are quantized. An embedding is only when it is the head as well (`tied`): looking rows up
    reads so little that fewer bits would bring nothing.
    """
    if bits is None:
        return None
    if name == HEAD or (name == EMBEDDING and tied):
        return max(bits, _HEAD_BITS)
    return bits if name.endswith("_proj.weight") else None
