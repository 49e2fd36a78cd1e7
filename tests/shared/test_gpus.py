"""Which GPUs a process is told of, whole and in parts, and which of them its user lets it use."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_nvidia_smi import uuid_of, write_listing, write_tool

from sfllm.gpus import Gpu, GpuListError, devices_of, list_gpus, parse_listing, visible_gpus

A, B, C = (uuid_of(letter) for letter in "abc")
PART, OTHER_PART = (f"MIG-{digit * 8}-2222-3333-4444-555555555555" for digit in "12")
OLD_PART = f"MIG-{A}/7/0"
LISTING = f"""\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: {A})
GPU 1: NVIDIA GeForce RTX 4090 (UUID: {B})
GPU 2: NVIDIA H100 80GB HBM3 (UUID: {C})
  MIG 3g.40gb     Device  0: (UUID: {PART})
  MIG 1g.10gb+me  Device  1: (UUID: {OTHER_PART})
"""
GPUS = parse_listing(LISTING)
ALIKE = tuple(Gpu(uuid, "NVIDIA L40S") for uuid in (A, B, C))


def test_the_listing_gives_gpus_and_the_parts_of_each() -> None:
    assert (
        Gpu(A, "NVIDIA H100 80GB HBM3"),
        Gpu(B, "NVIDIA GeForce RTX 4090"),
        Gpu(C, "NVIDIA H100 80GB HBM3", (PART, OTHER_PART)),
    ) == GPUS
    assert parse_listing("No devices found.\n") == ()


def test_parts_are_known_by_the_names_of_old_drivers_as_well() -> None:
    text = f"GPU 0: NVIDIA A100 (UUID: {A})\n  MIG 1g.5gb Device 0: (UUID: {OLD_PART})\n"
    assert parse_listing(text) == (Gpu(A, "NVIDIA A100", (OLD_PART,)),)


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, (A, B, PART, OTHER_PART)),
        ("", ()),
        ("-1", ()),
        ("2", ("2",)),
        ("2, 0", ("2", "0")),
        ("0,7,1", ("0",)),  # CUDA sees nothing from the first wrong entry on
        ("0,-1,1", ("0",)),
        (f"{B},GPU-cc", (B, "GPU-cc")),
        ("GPU-dd", ()),
        (PART, (PART,)),
    ],
)
def test_the_users_choice_is_read_as_cuda_reads_it(visible: str | None, seen: tuple[str, ...]) -> None:
    assert visible_gpus(GPUS, visible) == seen


@pytest.mark.parametrize(
    ("names", "devices"),
    [
        (("2", "0"), (PART, OTHER_PART, A)),
        ((B, "GPU-cc"), (B, PART, OTHER_PART)),
        ((PART, "2"), (PART, OTHER_PART)),
        ((), ()),
    ],
)
def test_a_partitioned_gpu_stands_for_its_parts(names: tuple[str, ...], devices: tuple[str, ...]) -> None:
    assert devices_of(GPUS, names, "PCI_BUS_ID") == devices


def test_a_number_is_refused_where_it_may_mean_another_gpu_to_cuda() -> None:
    for order in (None, "FASTEST_FIRST"):
        assert devices_of(ALIKE, ("2",), order) == (C,)
        with pytest.raises(ValueError, match="name them by UUID"):
            devices_of(GPUS, ("1",), order)
    assert devices_of(GPUS, ("1",), "PCI_BUS_ID") == (B,)


def test_gpus_are_found_by_the_drivers_tool(tmp_path: Path) -> None:
    assert list_gpus(write_listing(tmp_path, LISTING)) == GPUS


def test_there_are_none_without_the_tool(tmp_path: Path) -> None:
    assert list_gpus({"PATH": str(tmp_path)}) == ()


def test_a_tool_that_fails_is_an_error_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(GpuListError, match="cannot talk to the driver"):
        list_gpus(write_tool(tmp_path, "echo 'cannot talk to the driver' >&2; exit 9"))
    with pytest.raises(GpuListError, match="exit status 9"):
        list_gpus(write_tool(tmp_path, "exit 9"))
