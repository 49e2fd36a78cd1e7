"""The ahead-of-time check of the GPU kernels: that they pass it, and that it would notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench.gpu_static.compiling import CompileError, Resources, resources_in
from bench.gpu_static.forms import ARCHITECTURES, Form, pairwise
from bench.gpu_static.table import Table, TableError, growth_problems, naming_problems, own_problems

ROOT = Path(__file__).parents[2]
NORM = Form("norm", "norm_bf16_1024", 90)

SPILLS_WITH_ONE_WARP = """
import sys
from bench.gpu_static.compiling import compiled, prepare
prepare(sys.argv[1])
from sfllm_worker.kernels import norm
widest = max(norm.variants(), key=lambda variant: variant.constants["WIDTH"])
for starved in (widest, widest._replace(num_warps=1)):
    print(*compiled(starved, 90))
"""


def run_alone(*command: str) -> subprocess.CompletedProcess[str]:
    """Run python where triton's interpreter is not chosen."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = [sys.executable, *command]
    return subprocess.run(
        process, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def with_all_architectures(registers: int) -> dict[Form, Resources]:
    return {NORM._replace(architecture=each): Resources(registers, 0, 16) for each in ARCHITECTURES}


def test_a_subset_of_the_kernels_compiles_without_spills_and_with_the_registers_of_the_table() -> None:
    process = run_alone("-m", "bench.gpu_static", "--subset", "--jobs=1")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "0 problems" in process.stdout


def test_a_kernel_that_is_starved_of_registers_is_seen_to_spill(tmp_path: Path) -> None:
    process = run_alone("-c", SPILLS_WITH_ONE_WARP, str(tmp_path))
    lines = [Resources(*map(int, line.split())) for line in process.stdout.splitlines()]
    assert len(lines) == 2, process.stderr
    as_launched, starved = lines
    assert own_problems({NORM: as_launched}) == []
    assert own_problems({NORM: starved}) == [
        f"norm_bf16_1024 sm_90 spills {starved.spilled} bytes ({starved.registers} registers)"
    ]


def test_a_form_that_wants_more_shared_memory_than_its_architecture_has_is_a_problem() -> None:
    ada = NORM._replace(architecture=89)
    assert own_problems({NORM: Resources(32, 0, 200_000)}) == []
    assert own_problems({ada: Resources(32, 0, 200_000)}) == [
        "norm_bf16_1024 sm_89 wants 200000 bytes of shared memory, of 101376"
    ]


def test_a_form_that_does_not_compile_is_a_problem_with_its_reason() -> None:
    assert own_problems({NORM: "CompilationError: no such name"}) == [
        "norm_bf16_1024 sm_90 does not compile: CompilationError: no such name"
    ]


@pytest.mark.parametrize(("registers", "problems"), [(44, 0), (45, 1), (20, 0)])
def test_a_tenth_more_registers_than_the_table_are_allowed_and_no_more(registers: int, problems: int) -> None:
    table = Table("3.6.0", with_all_architectures(40))
    assert len(growth_problems({NORM: Resources(registers, 0, 16)}, table)) == problems


def test_variants_that_are_missing_in_the_table_or_only_there_are_problems() -> None:
    table = Table("3.6.0", with_all_architectures(40))
    assert naming_problems(table.entries, table) == []
    assert naming_problems([NORM._replace(variant="norm_new")], table) == [
        "norm_new sm_90 (norm) is not in the table",
        *(f"norm_bf16_1024 sm_{each} (norm) is only in the table" for each in ARCHITECTURES),
    ]


def test_a_table_reads_back_as_it_was_written_and_knows_its_release_of_triton() -> None:
    only_newer = NORM._replace(variant="fp8")
    table = Table("3.6.0", with_all_architectures(40) | {only_newer: Resources(50, 0, 0)})
    again = Table.read(table.written())
    assert again.entries == table.entries
    assert again.comparable("3.6.1")
    assert not again.comparable("3.7.0")


@pytest.mark.parametrize(
    "text", ["module,variant\n", "# triton 3.6.0\nmodule,variant\nnorm,norm_bf16_1024\n"]
)
def test_a_table_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(TableError):
        Table.read(text)


def test_a_log_without_registers_is_refused_instead_of_read_as_none() -> None:
    log = "4 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\nUsed 32 registers, 16 bytes smem"
    assert resources_in(log, 16) == Resources(32, 20, 16)
    with pytest.raises(CompileError):
        resources_in("ptxas info    : 0 bytes gmem", 16)


def test_a_pairwise_subset_has_every_pair_of_features_that_exists() -> None:
    described = {
        Form("m", f"{dtype}-{dim}-{kind}", sm): frozenset(
            ["kernel=m", f"type={dtype}", f"DIM={dim}", f"KIND={kind}"]
        )
        for dtype in ("bf16", "fp16")
        for dim in (64, 128, 256)
        for kind in ("silu", "gelu")
        for sm in ARCHITECTURES
    }
    chosen = pairwise(described)
    assert len(chosen) < len(described) / 3
    seen = {(form.architecture, feature) for form in chosen for feature in described[form]}
    for sm in ARCHITECTURES:
        assert {
            (sm, "type=bf16"),
            (sm, "type=fp16"),
            (sm, "DIM=64"),
            (sm, "DIM=128"),
            (sm, "DIM=256"),
        } <= seen
    for pair in [{"type=bf16", "KIND=gelu"}, {"type=fp16", "DIM=256"}, {"DIM=64", "KIND=silu"}]:
        assert any(pair <= described[form] for form in chosen)
