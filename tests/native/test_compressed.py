"""Compressed weights: the same bits in less memory, and the same outputs to the last bit."""

from __future__ import annotations

import ctypes
from ctypes import byref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_references import Sequences
from torch import Tensor

from sfllm_worker import sizing
from sfllm_worker.large_pages import Copies
from sfllm_worker.load import load_model
from sfllm_worker.native import structures as s
from sfllm_worker.native import unpacked
from sfllm_worker.native.choice import native_library
from sfllm_worker.native.compressed import VARIABLE, CompressedPanels, compress, is_served
from sfllm_worker.native.decoder import NativeDecoder
from sfllm_worker.native.library import check
from sfllm_worker.native.panels import PanelEmbedding, PanelLinear

COUNTS = (1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 16, 17, 24, 25, 40, 241)
SHAPE = "tiny-qwen3"

where_compressed = pytest.mark.parametrize("library", ["native", "avx2"], indirect=True)
"""With the registers that it takes: on a CPU that has fewer, these are skipped."""


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Numbers as models have them, with some that are rare in them: zeros, tiny and huge ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    strange = torch.tensor([0.0, -0.0, 1e-30, -3e38, 1e-40, 7.0])
    places = torch.randint(rows * columns, (max(1, rows * columns // 500),), generator=generator)
    weight.view(-1)[places] = strange[torch.arange(len(places)) % len(strange)]
    return weight.to(torch.bfloat16)


def compressed(library: ctypes.CDLL, weight: Tensor, unit: int, bias: Tensor | None = None) -> PanelLinear:
    """The weight with compressed panels alone."""
    linear = PanelLinear(weight, bias, unit)
    linear.compressed = compress(linear.matrix(), library, Copies())
    assert linear.compressed is not None
    linear.panels = None
    return linear


def product(library: ctypes.CDLL, linear: PanelLinear, x: Tensor, threads: int = 2) -> Tensor:
    matrix = linear.matrix()
    out = torch.full((len(x), matrix.rows), torch.nan)
    arguments = (x.data_ptr(), len(x), matrix.rows, out.data_ptr(), threads)
    check(library.sfllm_linear(s.BFLOAT16, byref(matrix), *arguments))
    return out


@where_compressed
@pytest.mark.parametrize(
    ("rows", "columns", "unit"), [(32, 64, 32), (80, 96, 40), (33, 126, 33), (64, 576, 64), (40, 1538, 40)]
)
def test_a_compressed_weight_is_smaller_and_has_every_bit(
    library: ctypes.CDLL, rows: int, columns: int, unit: int
) -> None:
    weight = random_weight(rows, columns)
    linear = compressed(library, weight, unit)
    dense = PanelLinear(weight, None, unit)
    assert linear.weight_bytes <= dense.weight_bytes * 7 / 8
    assert torch.equal(linear.words(), dense.words())
    assert torch.equal(linear.dense().view(torch.int16), weight.view(torch.int16))


@where_compressed
@pytest.mark.parametrize(("columns", "share"), [(576, 0.77), (1536, 0.76)])
def test_a_models_weight_takes_little_more_than_three_quarters(
    library: ctypes.CDLL, columns: int, share: float
) -> None:
    weight = torch.randn(256, columns, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    linear = compressed(library, weight, 256)
    assert linear.weight_bytes <= share * weight.nbytes


@where_compressed
@pytest.mark.parametrize("columns", [64, 94, 576, 1090])
def test_a_product_is_that_of_the_dense_weight_to_the_last_bit(library: ctypes.CDLL, columns: int) -> None:
    weight = random_weight(80, columns, seed=columns).clamp(-50, 50)
    bias = torch.randn(80, generator=torch.Generator().manual_seed(2))
    dense, linear = PanelLinear(weight, bias, 40), compressed(library, weight, 40, bias)
    x = torch.randn(max(COUNTS), columns, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    expected = product(library, dense, x)
    assert expected.isfinite().all()
    for count in COUNTS:
        for threads in (1, 2):
            assert torch.equal(product(library, linear, x[:count], threads), expected[:count])
    # Where dense panels are kept as well, products of many tokens read those.
    linear.panels = dense.panels
    for count in COUNTS:
        assert torch.equal(product(library, linear, x[:count]), expected[:count])


@where_compressed
def test_rows_of_a_compressed_embedding_are_those_of_the_weight(library: ctypes.CDLL) -> None:
    vocabulary = 83
    weight = random_weight(vocabulary, 126)
    embedding = PanelEmbedding(compressed(library, weight, vocabulary))
    ids, out = torch.arange(vocabulary), torch.full((vocabulary, 126), torch.nan)
    matrix = embedding.matrix()
    arguments = (vocabulary, ids.data_ptr(), len(ids), 1.0, out.data_ptr(), 2)
    assert not library.sfllm_embed(s.BFLOAT16, byref(matrix), *arguments)
    assert torch.equal(out, weight.float())
    assert torch.equal(embedding(ids).view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("library", ["sse2"], indirect=True)
def test_nothing_is_compressed_for_a_cpu_that_would_be_slow_at_it(library: ctypes.CDLL) -> None:
    linear = PanelLinear(random_weight(32, 64), None, 32)
    assert compress(linear.matrix(), library, Copies()) is None


@pytest.mark.parametrize("library", ["tiles"], indirect=True)
def test_products_by_matrix_tiles_read_dense_weights(library: ctypes.CDLL) -> None:
    assert not is_served(library, torch.bfloat16)


@where_compressed
def test_only_bfloat16_is_compressed_and_only_if_nobody_minds(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_served(library, torch.bfloat16)
    assert not is_served(library, torch.float32)
    monkeypatch.setenv(VARIABLE, "0")
    assert not is_served(library, torch.bfloat16)


def pack(weight: Tensor) -> CompressedPanels | None:
    library = native_library()
    assert library is not None
    linear = PanelLinear(weight, None, len(weight))  # to live as long as its matrix
    return compress(linear.matrix(), library, Copies())


@pytest.fixture(scope="session")
def compresses() -> None:
    library = native_library()
    if library is None or not is_served(library, torch.bfloat16) or pack(random_weight(32, 64)) is None:
        pytest.skip("weights are not compressed here")


@pytest.mark.usefixtures("compresses")
@given(
    common=st.lists(st.integers(0, 255), min_size=1, max_size=16),
    rare=st.lists(st.tuples(st.integers(0, 32 * 256 - 1), st.integers(0, 2**16 - 1)), max_size=200),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_bits_come_back(common: list[int], rare: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    upper = torch.tensor(common)[torch.randint(len(common), (32 * 256,), generator=generator)]
    elements = upper * 256 + torch.randint(256, (32 * 256,), generator=generator)
    for place, element in rare:
        elements[place] = element
    weight = elements.to(torch.uint16).view(torch.bfloat16).view(32, 256)
    packed = pack(weight)
    assert packed is not None
    assert torch.equal(packed.words(), PanelLinear(weight, None, 32).words())


@pytest.mark.usefixtures("compresses")
def test_a_weight_without_common_exponents_stays_as_it_is() -> None:
    bits = torch.randint(-(2**15), 2**15, (64, 256), generator=torch.Generator().manual_seed(0))
    assert pack(bits.to(torch.int16).view(torch.bfloat16)) is None


@pytest.mark.usefixtures("compresses")
@pytest.mark.parametrize(("each", "pays"), [(20, True), (21, False)])
def test_a_list_that_eats_up_the_gain_is_not_made(each: int, pays: bool) -> None:
    # 41 upper bytes, of which 16 have codes: 25 are listed, 506 entries are as many as leave an eighth saved.
    bits = torch.full((32 * 256,), 0x3F80)
    bits[: 40 * each] = (torch.arange(40) << 8).repeat(each)
    assert (pack(bits.to(torch.int16).view(torch.bfloat16).view(32, 256)) is not None) == pays


def decoder() -> NativeDecoder:
    loaded = load_model(SHAPE, dtype="bfloat16", load_format="dummy").decoder
    assert isinstance(loaded, NativeDecoder)
    return loaded


@pytest.mark.usefixtures("compresses")
def test_steps_are_the_same_to_the_last_bit_compressed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    both = decoder()
    monkeypatch.setenv(unpacked.VARIABLE, "0")
    alone = decoder()
    monkeypatch.setenv(VARIABLE, "0")
    plain = decoder()
    assert both.unpacked_bytes
    assert not alone.unpacked_bytes
    assert not plain.unpacked_bytes
    assert alone.weight_bytes == both.weight_bytes < plain.weight_bytes
    texts = [[(7 * i + n) % 512 for i in range(n)] for n in (1, 8, 9, 30, 150)]
    runs = [Sequences(model, len(texts), 200) for model in (both, alone, plain)]
    for new in (list(enumerate(texts)), [(i, [i]) for i in range(len(texts))], [(2, [5])]):
        rows = [run.step(new) for run in runs]
        for others in rows[:2]:
            assert all(torch.equal(a, b) for a, b in zip(others, rows[2], strict=True))


@pytest.mark.usefixtures("compresses")
def test_a_model_too_large_for_both_has_compressed_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = decoder().config
    heads = config.q_size + 2 * config.num_kv_heads * config.head_dim
    layer = heads * config.hidden_size + config.hidden_size * config.q_size
    layer += 3 * config.hidden_size * config.intermediate_size
    needed = 2 * (config.num_layers * layer + config.vocab_size * config.hidden_size)
    for free, kept in ((unpacked.FREE_SHARE * needed - 1, False), (unpacked.FREE_SHARE * needed, True)):
        monkeypatch.setattr(sizing, "free_bytes", lambda _device, free=free: free)
        assert bool(decoder().unpacked_bytes) == kept
