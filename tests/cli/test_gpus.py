"""Which GPUs `sfllm serve` finds, and which worker gets which."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_nvidia_smi import listing, uuid_of, write_listing, write_tool

from sfllm.config import parse
from sfllm_cli.gpus import find_gpus
from sfllm_cli.serve_plan import admin_ports, child_specs
from sfllm_cli.settings import AllServeSettings, ServicesSettings, split

A, B, C = (uuid_of(letter) for letter in "abc")


def settings(*flags: str) -> ServicesSettings:
    return split(parse(AllServeSettings, prog="serve", description="", argv=flags, environ={}))


def test_gpus_are_found_by_the_drivers_tool(tmp_path: Path) -> None:
    environment = write_listing(tmp_path, listing((A, B, C)))
    assert find_gpus(environment) == (A, B, C)
    assert find_gpus({**environment, "CUDA_VISIBLE_DEVICES": "1,2"}) == ("1", "2")


def test_no_gpu_is_found_without_the_tool_or_with_one_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_gpus({"PATH": str(tmp_path)}) == ()
    assert capsys.readouterr().err == ""
    assert find_gpus(write_tool(tmp_path, "exit 9")) == ()
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


def test_workers_that_claim_gpus_are_given_none(tmp_path: Path) -> None:
    specs = child_specs(settings("--workers=auto", "--gpu-claims=/claims"), tmp_path, {}, 8, (A, B))
    workers = [spec for spec in specs if spec.name.startswith("worker")]
    assert ["CUDA_VISIBLE_DEVICES" in spec.environment for spec in workers] == [False, False]
    assert all("--gpu-claims=/claims" in spec.command for spec in workers)


def test_a_worker_that_is_alone_keeps_the_users_choice(tmp_path: Path) -> None:
    specs = child_specs(settings(), tmp_path, {"CUDA_VISIBLE_DEVICES": "1,0"}, 8)
    assert specs[-1].environment["CUDA_VISIBLE_DEVICES"] == "1,0"


@pytest.mark.parametrize("wrong", ["0", "65", "many"])
def test_another_number_of_workers_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings(f"--workers={wrong}")
    assert "--workers" in capsys.readouterr().err
