"""Which GPUs `sfllm serve` finds, and which worker gets which."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfllm.config import parse
from sfllm_cli.gpus import find_gpus, parse_listing, visible_gpus
from sfllm_cli.serve_plan import admin_ports, child_specs
from sfllm_cli.settings import AllServeSettings, ServicesSettings, split

A, B, C = (f"GPU-{letter * 8}-0000-1111-2222-333344445555" for letter in "abc")
LISTING = f"""\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: {A})
  MIG 1g.10gb     Device  0: (UUID: MIG-11111111-2222-3333-4444-555555555555)
GPU 1: NVIDIA GeForce RTX 4090 (UUID: {B})
GPU 2: NVIDIA L40S (UUID: {C})
"""


def settings(*flags: str) -> ServicesSettings:
    return split(parse(AllServeSettings, prog="serve", description="", argv=flags, environ={}))


def tool(directory: Path, script: str) -> dict[str, str]:
    """An environment in which `nvidia-smi` is a program of ours."""
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{directory}:/usr/bin:/bin"}


def test_the_listing_gives_gpus_and_not_their_parts() -> None:
    assert parse_listing(LISTING) == (A, B, C)
    assert parse_listing("No devices found.\n") == ()


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, (A, B, C)),
        ("", ()),
        ("-1", ()),
        ("2", ("2",)),
        ("2, 0", ("2", "0")),
        ("0,7,1", ("0",)),  # CUDA sees nothing from the first wrong entry on
        ("0,-1,1", ("0",)),
        (f"{B},GPU-cc", (B, "GPU-cc")),
        ("GPU-dd", ()),
        ("MIG-11111111-2222-3333-4444-555555555555", ("MIG-11111111-2222-3333-4444-555555555555",)),
    ],
)
def test_the_users_choice_is_read_as_cuda_reads_it(visible: str | None, seen: tuple[str, ...]) -> None:
    assert visible_gpus((A, B, C), visible) == seen


def test_gpus_are_found_by_the_drivers_tool(tmp_path: Path) -> None:
    environment = tool(tmp_path, f"[ \"$1\" = -L ] && cat <<'END'\n{LISTING}END")
    assert find_gpus(environment) == (A, B, C)
    assert find_gpus({**environment, "CUDA_VISIBLE_DEVICES": "1,2"}) == ("1", "2")


def test_no_gpu_is_found_without_the_tool_or_with_one_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_gpus({"PATH": str(tmp_path)}) == ()
    assert capsys.readouterr().err == ""
    assert find_gpus(tool(tmp_path, "exit 9")) == ()
    assert "nvidia-smi failed" in capsys.readouterr().err


def test_auto_is_a_worker_for_each_gpu_which_it_alone_sees(tmp_path: Path) -> None:
    given = settings("--workers=auto", "--admin-port=9100")
    specs = child_specs(given, tmp_path, {"CUDA_VISIBLE_DEVICES": "0,2"}, 8, ("0", "2"))
    seen = [spec.environment["CUDA_VISIBLE_DEVICES"] for spec in specs if spec.name.startswith("worker")]
    assert seen == ["0", "2"]
    assert admin_ports(given.serve, ("0", "2")) == [9100, 9101, 9102, 9103]


def test_auto_without_a_gpu_is_one_worker(tmp_path: Path) -> None:
    specs = child_specs(settings("--workers=auto"), tmp_path, {}, 8)
    assert [spec.name for spec in specs] == ["scheduler", "gateway-0", "worker-0"]


def test_more_workers_than_gpus_take_them_in_turn(tmp_path: Path) -> None:
    specs = child_specs(settings("--workers=3"), tmp_path, {}, 8, (A, B))
    assert [spec.environment.get("CUDA_VISIBLE_DEVICES") for spec in specs[-3:]] == [A, B, A]


def test_a_worker_that_is_alone_keeps_the_users_choice(tmp_path: Path) -> None:
    specs = child_specs(settings(), tmp_path, {"CUDA_VISIBLE_DEVICES": "1,0"}, 8)
    assert specs[-1].environment["CUDA_VISIBLE_DEVICES"] == "1,0"


@pytest.mark.parametrize("wrong", ["0", "65", "many"])
def test_another_number_of_workers_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings(f"--workers={wrong}")
    assert "--workers" in capsys.readouterr().err
