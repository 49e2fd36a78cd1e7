"""Which implementation runs a model: chosen here, by the device of its weights.

Triton is imported only where a GPU is to use it, because that takes a fifth of a second.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

from sfllm_worker.model.attention import AttentionBackend, TorchAttention
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.decoder import Decoder, DecoderWeights
from sfllm_worker.native.attention import NativeAttention, fitting_library
from sfllm_worker.native.decoder import NativeDecoder

_log = logging.getLogger(__name__)


def make_decoder(
    config: ModelConfig,
    weights: DecoderWeights,
    context_length: int | None = None,
    deterministic: bool = False,
) -> Decoder:
    """The fastest decoder for these weights: Triton's on a GPU, the native one on a CPU, else plain torch.

    `context_length` is the longest context that will be served, None for all the model has. With
    `deterministic` a token's attention does not depend on whether it is decoded or recomputed in a chunk;
    the native one never does.
    """
    dtype, device = weights.embedding.dtype, weights.embedding.device
    if device.type == "cuda" and has_triton():
        return make_triton_decoder(config, weights, context_length, deterministic)
    library = fitting_library(config, dtype, device)
    return Decoder(config, weights) if library is None else NativeDecoder(config, weights, library)


def make_attention(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    """The fastest attention for a model whose other parts run elsewhere."""
    if device.type == "cuda" and has_triton():
        return make_triton_attention(config, dtype, device)
    library = fitting_library(config, dtype, device)
    return TorchAttention(config) if library is None else NativeAttention(library)


def make_triton_decoder(
    config: ModelConfig, weights: DecoderWeights, context_length: int | None, deterministic: bool = False
) -> Decoder:
    """The decoder in Triton's kernels; arguments as for `make_decoder`."""
    from sfllm_worker.kernels.decoder import TritonDecoder  # noqa: PLC0415 - not on a CPU

    dtype, device = weights.embedding.dtype, weights.embedding.device
    attention = make_triton_attention(config, dtype, device, deterministic)
    return TritonDecoder(config, weights, attention, context_length)


def make_triton_attention(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, deterministic: bool = False
) -> AttentionBackend:
    """The attention in Triton's kernels; `deterministic` as for `make_decoder`."""
    from sfllm_worker.kernels.attention import TritonAttention  # noqa: PLC0415 - not on a CPU

    return TritonAttention(config, dtype, device, decodes_as_chunks=deterministic)


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; if not, it is said once."""
    if importlib.util.find_spec("triton") is not None:
        return True
    _log.warning("triton is not installed, so the model runs in plain torch, several times slower")
    return False
