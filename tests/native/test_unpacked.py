"""Quantized weights that are kept unpacked as well: the same outputs, in memory that is given for it."""

from __future__ import annotations

import ctypes
from ctypes import byref

import pytest
import torch
from model_references import Sequences
from torch import Tensor

from sfllm_worker import sizing
from sfllm_worker.load import load_model
from sfllm_worker.native import compressed
from sfllm_worker.native.attention import ELEMENT_TYPES
from sfllm_worker.native.decoder import NativeDecoder
from sfllm_worker.native.library import check
from sfllm_worker.native.panels import PanelLinear
from sfllm_worker.native.quantized_panels import QuantizedPanelLinear
from sfllm_worker.native.unpacked import FREE_SHARE, VARIABLE, fits, keep_unpacked
from sfllm_worker.quant.weight import GROUP, QuantizedWeight

KINDS = ["int8", "int8-offset", "int4", "int4-offset"]
DTYPES = [torch.float32, torch.bfloat16]
SHAPE = "tiny-qwen3"


def layer(kind: str, rows: int, columns: int, unit: int, dtype: torch.dtype) -> QuantizedPanelLinear:
    generator = torch.Generator().manual_seed(columns)
    low, high, stored = (0, 16, torch.uint8) if "4" in kind else (-128, 128, torch.int8)
    values = torch.randint(low, high, (rows, columns), generator=generator, dtype=stored)
    groups = (rows, -(-columns // GROUP))
    scales, offsets = (torch.randn(groups, generator=generator).half() for _ in range(2))
    weight = QuantizedWeight(values, scales, offsets if "offset" in kind else None)
    return QuantizedPanelLinear(weight, torch.randn(rows, generator=generator), unit, dtype)


def product(library: ctypes.CDLL, linear: QuantizedPanelLinear, x: Tensor) -> Tensor:
    matrix = linear.matrix()
    out = torch.full((len(x), matrix.rows), float("nan"))
    arguments = (x.data_ptr(), len(x), matrix.rows, out.data_ptr(), 2)
    check(library.sfllm_linear(ELEMENT_TYPES[x.dtype], byref(matrix), *arguments))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [34, 96, 1090])
def test_a_product_is_the_same_to_the_last_bit_from_unpacked_words(
    library: ctypes.CDLL, kind: str, dtype: torch.dtype, columns: int
) -> None:
    linear = layer(kind, 80, columns, 40, dtype)
    x = torch.randn(250, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    counts = (1, 7, 8, 9, 10, 12, 13, 17, 24, 63, 64, 65, 241, 250)
    before = [product(library, linear, x[:count]) for count in counts]
    assert keep_unpacked([linear], library) == linear.unpacked_bytes
    assert linear.unpacked is not None
    assert linear.unpacked.nbytes == linear.unpacked_bytes
    for count, rows in zip(counts, before, strict=True):
        assert torch.equal(product(library, linear, x[:count]), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "unit"), [(33, 34, 33), (96, 64, 96), (80, 126, 40)])
def test_what_is_kept_are_the_panels_of_the_rounded_weight(
    library: ctypes.CDLL, kind: str, dtype: torch.dtype, rows: int, columns: int, unit: int
) -> None:
    linear = layer(kind, rows, columns, unit, dtype)
    keep_unpacked([linear], library)
    linear.bias = None
    weight = linear(torch.eye(columns, dtype=dtype)).T.contiguous()
    assert linear.unpacked is not None
    # As numbers, because a zero may have either sign.
    assert torch.equal(linear.unpacked.view(dtype), PanelLinear(weight, None, unit).words().view(dtype))


def test_copies_take_at_most_their_share_of_free_memory() -> None:
    assert fits(10, 10 * FREE_SHARE)
    assert not fits(11, 11 * FREE_SHARE - 1)
    assert not fits(1, 0)


def decoder(quantization: str = "int4") -> NativeDecoder:
    loaded = load_model(SHAPE, dtype="bfloat16", load_format="dummy", quantization=quantization).decoder
    if not isinstance(loaded, NativeDecoder):
        pytest.skip("no native kernels here")
    return loaded


def addresses(model: NativeDecoder) -> list[int | None]:
    layers = model.weights.layers
    every = [linear for w in layers for linear in (w.qkv, w.attention_output, w.gate_up, w.down)]
    every.append(model.weights.head)
    assert all(isinstance(linear, QuantizedPanelLinear) for linear in every)
    return [linear.matrix().unpacked for linear in every if isinstance(linear, QuantizedPanelLinear)]


def test_a_model_over_its_share_keeps_no_copy_and_another_one_all(monkeypatch: pytest.MonkeyPatch) -> None:
    keeping = decoder()
    assert all(addresses(keeping))
    needed = keeping.unpacked_bytes
    for free, kept in ((FREE_SHARE * needed - 1, 0), (FREE_SHARE * needed, needed)):
        monkeypatch.setattr(sizing, "free_bytes", lambda _device, free=free: free)
        sized = decoder()
        assert sized.unpacked_bytes == kept
        assert [address is not None for address in addresses(sized)] == [kept > 0] * len(addresses(sized))


def test_steps_are_the_same_to_the_last_bit_with_and_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    keeping = decoder()
    monkeypatch.setenv(VARIABLE, "0")
    without = decoder()
    assert keeping.unpacked_bytes
    assert not without.unpacked_bytes
    texts = [[(7 * i + n) % 512 for i in range(n)] for n in (1, 8, 9, 30, 150)]
    runs = [Sequences(model, len(texts), 200) for model in (keeping, without)]
    prompts = [run.step(list(enumerate(texts))) for run in runs]
    decodes = [run.step([(i, [i]) for i in range(len(texts))]) for run in runs]
    for with_copies, others in (prompts, decodes):
        assert all(torch.equal(a, b) for a, b in zip(with_copies, others, strict=True))


def test_a_model_of_dense_weights_needs_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compressed.VARIABLE, "0")
    assert decoder("none").unpacked_bytes == 0
