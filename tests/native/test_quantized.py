"""Panels of quantized weights as the kernels unpack them, against the weights they were packed from."""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfllm_worker.native.build import COMPILE_FLAGS, SOURCES, BuildError, find_compiler
from sfllm_worker.quant.panels import PANEL, QuantizedPanels, pack_panels
from sfllm_worker.quant.weight import GROUP, QuantizedWeight

ENTRY = Path(__file__).with_name("quantized_entry.cpp")
KINDS = ["int8", "int8-offset", "int4", "int4-offset"]
DTYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
VARIANTS = {
    "native": ["-march=native"],
    "avx512": ["-march=x86-64-v4"],
    "avx2": ["-march=x86-64-v3"],
    "sse2": ["-march=x86-64"],
}


@pytest.fixture(scope="session", params=VARIANTS)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    needed = {"avx512": "avx512bw", "avx2": "avx2", "sse2": "sse2"}.get(request.param, "")
    if needed not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {needed}")
    target = tmp_path_factory.mktemp("quantized") / "entry.so"
    options = [*COMPILE_FLAGS, *VARIANTS[request.param], "-shared", f"-I{SOURCES}"]
    subprocess.run([compiler, *options, str(ENTRY), "-o", str(target)], check=True, timeout=120)
    library = ctypes.CDLL(str(target))
    library.panel_bytes.restype, library.panel_bytes.argtypes = c_int64, [c_int64, c_int64]
    for name in DTYPES.values():
        getattr(library, f"unpack_{name}").argtypes = [c_int64, c_void_p, *[c_int64] * 3, c_void_p]
    return library


def random_weight(kind: str, rows: int, columns: int, seed: int = 0) -> QuantizedWeight:
    """Values of the whole range; scales and offsets of either sign, from subnormal ones to large ones."""
    generator = torch.Generator().manual_seed(seed)
    low, high, dtype = (0, 16, torch.uint8) if "4" in kind else (-128, 128, torch.int8)
    values = torch.randint(low, high, (rows, columns), generator=generator, dtype=dtype)

    def halves() -> Tensor:
        shape = (rows, -(-columns // GROUP))
        exponents = torch.randint(-25, 3, shape, generator=generator)
        return (torch.randn(shape, generator=generator) * 2.0**exponents).half()

    return QuantizedWeight(values, halves(), halves() if "offset" in kind else None)


def unpacked(
    library: ctypes.CDLL, panels: QuantizedPanels, columns: int, dtype: torch.dtype, groups_each: int = 99
) -> Tensor:
    """`[padded rows, columns]` from what the kernel writes: `[words][32]` of so many groups at a time."""
    groups = -(-columns // GROUP)
    rows = []
    for panel in panels.data:
        assert panel.nbytes == library.panel_bytes(panels.kind, columns)
        parts = []
        for first in range(0, groups, groups_each):
            last = min(first + groups_each, groups)
            words = -(-(min(last * GROUP, columns) - first * GROUP) * dtype.itemsize // 4)
            out = torch.full((words * PANEL + 1,), 0x7FC07FC0, dtype=torch.int32)
            unpack = getattr(library, f"unpack_{DTYPES[dtype]}")
            unpack(panels.kind, panel.data_ptr(), columns, first, last, out.data_ptr())
            assert out[-1] == 0x7FC07FC0  # nothing is written behind the words
            parts.append(out[:-1].view(words, PANEL))
        rows.append(torch.cat(parts).T.flatten().view(dtype).view(PANEL, -1))
    everything = torch.cat(rows)
    assert not everything[:, columns:].any()  # the other half of a last word
    return everything[:, :columns]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (31, 33), (32, 32), (50, 96), (70, 127), (96, 576), (33, 45)]
)
def test_panels_unpack_to_the_last_bit_of_the_rounded_weight(
    quantized: ctypes.CDLL, dtype: torch.dtype, kind: str, rows: int, columns: int
) -> None:
    weight = random_weight(kind, rows, columns)
    ours = unpacked(quantized, pack_panels(weight), columns, dtype)
    assert torch.equal(ours[:rows], weight.dequantize().to(dtype))
    assert not ours[rows:].any()


@pytest.mark.parametrize("groups_each", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_panel_unpacks_alike_in_parts(quantized: ctypes.CDLL, kind: str, groups_each: int) -> None:
    weight = random_weight(kind, 32, 5 * GROUP + 9)
    ours = unpacked(quantized, pack_panels(weight), 5 * GROUP + 9, torch.bfloat16, groups_each)
    assert torch.equal(ours, weight.dequantize().bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_units_begin_panels_of_their_own(quantized: ctypes.CDLL, kind: str) -> None:
    weight = random_weight(kind, 3 * 40, 64)
    ours = unpacked(quantized, pack_panels(weight, unit=40), 64, torch.float32).view(3, 64, 64)
    assert torch.equal(ours[:, :40].reshape(120, 64), weight.dequantize())
    assert not ours[:, 40:].any()
