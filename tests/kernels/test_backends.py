"""Which decoder and attention serve where."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from sfllm_worker import backends
from sfllm_worker.kernels import attention
from sfllm_worker.kernels.attention import TritonAttention
from sfllm_worker.kernels.decoder import TritonDecoder
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load import load_model
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.native.attention import fitting_library
from sfllm_worker.native.decoder import NativeDecoder


def test_a_cpu_loads_a_model_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sfllm_worker.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it is an error now
    decoder = load_model("tiny-llama", dtype="float32", load_format="dummy").decoder
    native = fitting_library(decoder.config, decoder.dtype, decoder.device) is not None
    assert isinstance(decoder, NativeDecoder) == native


def test_a_gpu_gets_the_decoder_and_the_attention_of_the_kernels() -> None:
    loaded = load_model("tiny-llama", dtype="float32", load_format="dummy", device="meta")
    assert type(loaded.decoder) is backends.Decoder
    decoder = backends.make_triton_decoder(loaded.config, loaded.decoder.weights, context_length=40)
    assert isinstance(decoder, TritonDecoder)
    assert isinstance(decoder.attention, TritonAttention)


@pytest.mark.parametrize("deterministic", [False, True])
def test_decodes_share_the_kernel_of_chunks_only_where_results_must_not_depend_on_it(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    for kernel in ("decode_attention", "prefill_attention"):
        monkeypatch.setattr(attention, kernel, lambda *_, name=kernel: launched.append(name))
    loaded = load_model("tiny-llama", dtype="float32", load_format="dummy")
    decoder = backends.make_triton_decoder(loaded.config, loaded.decoder.weights, 40, deterministic)
    kv = KVCache(loaded.config, 3, 16, torch.float32)
    step = decoder.attention.begin(AttentionBatch.build([1, 1], [5, 9], [[1], [2]], 16))
    step.attend(kv.layers[0], torch.zeros(2, loaded.config.num_heads, loaded.config.head_dim))
    assert launched == ["prefill_attention" if deterministic else "decode_attention"]


def test_that_triton_is_missing_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backends.has_triton.cache_clear()
    try:
        assert [backends.has_triton(), backends.has_triton()] == [False, False]
    finally:
        backends.has_triton.cache_clear()
    assert caplog.text.count("triton is not installed") == 1
