"""What `sfllm doctor` makes of what it was told: load, clocks, versions, limits, GPUs, disks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from sfllm_cli.doctor.api_checks import check_api
from sfllm_cli.doctor.certificate import Certificate, is_loopback
from sfllm_cli.doctor.evidence import Api, Evidence, Process
from sfllm_cli.doctor.findings import Finding
from sfllm_cli.doctor.gpu_checks import check_gpus
from sfllm_cli.doctor.link_checks import check_links
from sfllm_cli.doctor.load_checks import check_load
from sfllm_cli.doctor.machine import Disk, Gpus, Kernels, Machine, Torch, find_driver, parse_build
from sfllm_cli.doctor.machine_checks import GIB, check_machine
from sfllm_cli.doctor.model_checks import check_fleet, check_models
from sfllm_cli.doctor.probe import Answer, ClockOffset
from sfllm_cli.doctor.process_checks import check_clocks, check_limits, check_processes, check_versions
from sfllm_cli.doctor.samples import Samples, read_samples

WELL = Answer(200, '{"status":"healthy"}')
VERSION = Answer(200, '{"version":"1.0"}')
QUIET = 'x_num_requests_waiting_by_reason{reason="no_worker"} 0\n'


def process(page: str, before: str = "", *, health: Answer = WELL, version: Answer = VERSION) -> Process:
    return Process("host:1", health, WELL, version, read_samples(before or page), read_samples(page))


def worker(page: str, **more: str) -> Process:
    return process(page + 'vllm:kv_cache_usage_perc{model_name="m"} 0\n', **more)


def stack(*processes: Process, api: Api | None = None, machine: Machine | None = None) -> Evidence:
    silent = Process("host:0", Answer(failure="refused"), Answer(), Answer())
    return Evidence(api or Api(silent), processes, machine)


def api(info: str = "{}", *, page: str = "", **more: object) -> Api:
    gateway = process(f"gateway_schedulers_connected 1\n{page}")
    return Api(gateway, Answer(401), None, Answer(200, info))._replace(**more)


def statuses(findings: Sequence[Finding]) -> list[str]:
    return [found.status for found in findings]


def only(findings: Sequence[Finding]) -> Finding:
    (found,) = findings
    # A line each: the table has a row for every finding, and whoever reads it has to do something.
    assert "\n" not in found.meaning + found.remedy
    assert found.status == "ok" or found.remedy
    return found


@pytest.mark.parametrize("prefix", ["", "sfllm:", "vllm:", "any_"])
def test_a_process_is_known_by_its_metrics_whatever_their_prefix(prefix: str) -> None:
    page = f'{prefix}kv_cache_usage_perc{{model_name="m"}} 0.5\n{prefix}kv_blocks{{state="used"}} 2\n'
    samples = read_samples(page + f'{prefix}kv_blocks{{state="free"}} 3\nprocess_open_fds 7\n')
    assert (samples.role, samples.prefix) == ("worker", prefix)
    assert (samples.total("kv_blocks"), samples.total("kv_blocks", state="free")) == (5, 3)
    assert (samples.total("process_open_fds"), samples.total("num_preemptions_total")) == (7, None)


def test_metrics_of_something_else_have_no_role() -> None:
    assert read_samples("node_load1 0.5\n") == Samples(lines=read_samples("node_load1 0.5\n").lines)


@pytest.mark.parametrize(
    ("page", "before", "status", "part"),
    [
        (QUIET + "x_num_requests_waiting 9\n", QUIET + "x_num_requests_waiting 9\n", "ok", "9 requests wait"),
        (QUIET + "x_num_requests_waiting 9\n", QUIET + "x_num_requests_waiting 3\n", "warning", "6 more"),
        (
            QUIET + 'x_admission_rejections_total{reason="queue"} 4\n',
            QUIET,
            "warning",
            "4 requests were refused",
        ),
        ('x_num_requests_waiting_by_reason{reason="no_worker"} 2\n', "", "problem", "no worker serves"),
        ("kv_cache_usage_perc 0.97\n", "", "warning", "97% used"),
        (
            "kv_cache_usage_perc 0.5\nnum_preemptions_total 3\n",
            "kv_cache_usage_perc 1\n",
            "warning",
            "3 sequences",
        ),
    ],
)
def test_load_is_told_by_two_looks(page: str, before: str, status: str, part: str) -> None:
    found = only(list(check_load(stack(process(page, before)))))
    assert (found.status, part in found.meaning) == (status, True), found


@pytest.mark.parametrize(
    ("offsets", "status", "part"),
    [
        ([(-0.9, 0.1), (0.0, 1.0)], "ok", "agree"),
        ([(-0.9, 0.1), (29.5, 30.5)], "warning", "30 s ahead of this machine"),
        ([(-3600.0, -3599.0)], "warning", "this machine is at least 3599 s ahead"),
    ],
)
def test_clocks_that_differ_by_more_than_answers_can_hide_are_told(
    offsets: list[tuple[float, float]], status: str, part: str
) -> None:
    processes = [
        worker("")._replace(address=f"host:{index}", health=WELL._replace(clock=ClockOffset(*offset)))
        for index, offset in enumerate(offsets)
    ]
    found = only(list(check_clocks(stack(*processes))))
    assert (found.status, part in found.meaning) == (status, True), found


def test_processes_of_several_versions_are_named_with_theirs() -> None:
    assert only(list(check_versions(stack(worker("")), "1.0"))).status == "ok"
    older = worker("")._replace(version=Answer(404))
    found = only(list(check_versions(stack(worker(""), older), "1.1")))
    assert found.status == "warning"
    assert found.meaning == (
        "they differ: 1.0: worker at host:1; 1.1: this command; unknown: worker at host:1"
    )


@pytest.mark.parametrize(
    ("health", "ready", "part"),
    [
        (Answer(failure="timeout"), Answer(), "no answer in time"),
        (Answer(failure="unreachable", detail="no route"), Answer(), "no route"),
        (Answer(503, '{"reason":"the loop stands still"}'), Answer(), "the loop stands still"),
        (WELL, Answer(503, '{"reason":"no scheduler yet"}'), "no scheduler yet"),
    ],
)
def test_a_process_that_is_not_well_is_a_problem_in_its_own_words(
    health: Answer, ready: Answer, part: str
) -> None:
    found = only(list(check_processes(stack(worker("")._replace(health=health, ready=ready)))))
    assert (found.status, part in found.meaning) == ("problem", True)


@pytest.mark.parametrize(
    ("files", "info", "expected"),
    [
        ((10, 65536), '{"max_streams":2048,"open_requests":3}', ["ok", "ok"]),
        ((10, 1024), '{"max_streams":2048,"open_requests":3}', ["ok", "warning"]),
        ((850, 1000), '{"max_streams":100,"open_requests":3}', ["warning", "ok"]),
        ((990, 1000), '{"max_streams":100,"open_requests":95}', ["problem", "warning"]),
    ],
)
def test_a_gateway_needs_files_for_its_streams(
    files: tuple[int, int], info: str, expected: list[str]
) -> None:
    page = f"process_open_fds {files[0]}\nprocess_max_fds {files[1]}\n"
    assert statuses(list(check_limits(stack(api=api(info, page=page))))) == expected


def test_workers_of_one_model_should_be_alike_and_known_to_the_gateway() -> None:
    known = api('{"models":[{"id":"m","workers":1}]}')
    large, small = (worker(f'vllm:kv_blocks{{state="free"}} {count}\n') for count in (1000, 600))
    assert statuses(list(check_fleet(stack(large, large)))) == ["ok"]
    _, likeness, joined = check_fleet(stack(large, small, api=known))
    assert "from 600 to 1000 blocks" in likeness.meaning
    assert joined.meaning == "2 workers run, and the gateway knows of 1"
    assert (likeness.status, joined.status) == ("warning", "warning")


@pytest.mark.parametrize(
    ("labels", "status", "part"),
    [
        (('fingerprint="a",max_model_len="8"', 'fingerprint="a",max_model_len="8"'), "ok", "serve the same"),
        (('fingerprint="a",max_model_len="8"', 'fingerprint="b",max_model_len="8"'), "problem", "a: worker"),
        (('fingerprint="a",max_model_len="8"', 'fingerprint="a",max_model_len="9"'), "warning", "lengths"),
    ],
)
def test_workers_that_serve_different_models_by_one_name_are_told(
    labels: tuple[str, str], status: str, part: str
) -> None:
    workers = (worker(f'vllm:model_info{{model_name="m",{label}}} 1\n') for label in labels)
    found = [item for item in check_fleet(stack(*workers)) if item.check == "model cards of m"]
    assert (only(found).status, part in only(found).meaning) == (status, True)


def test_a_worker_that_is_sent_away_is_told() -> None:
    page = QUIET + 'x_workers{state="serving"} 1\n'
    refusing = process(page + "x_worker_refusals_total 3\n", page + "x_worker_refusals_total 2\n")
    (found,) = check_fleet(stack(refusing))
    assert (found.status, "sent away" in found.meaning) == ("problem", True)


@pytest.mark.parametrize(
    ("values", "elsewhere", "expected"),
    [
        ((1, 1), True, ["ok"]),
        ((0, 0), False, ["ok"]),
        ((0, 0), True, ["warning"]),
        ((0, 1), False, ["problem"]),
        ((), True, []),
    ],
)
def test_links_are_encrypted_beyond_a_machine_and_alike_everywhere(
    values: tuple[int, ...], elsewhere: bool, expected: list[str]
) -> None:
    workers = [worker(f"vllm:links_encrypted {value}\n") for value in values]
    assert statuses(list(check_links(stack(*workers)._replace(elsewhere=elsewhere)))) == expected


@pytest.mark.parametrize(
    ("page", "before", "status", "part"),
    [
        ("", "", "ok", "nobody"),
        ('x_scheduler_links_refused_total{socket="worker"} 3\n', "", "problem", "3 connections were just"),
        (*['x_scheduler_links_refused_total{socket="worker"} 3\n'] * 2, "warning", "worker 3"),
        ('x_malformed_messages_total{link="gateway"} 2\n', "", "problem", "2 messages could not be read"),
        (*['x_malformed_messages_total{link="gateway"} 2\n'] * 2, "ok", "nobody"),
    ],
)
def test_peers_that_a_scheduler_turns_away_are_told(page: str, before: str, status: str, part: str) -> None:
    found = only(list(check_links(stack(process(QUIET + page, QUIET + before)))))
    assert (found.status, part in found.meaning) == (status, True), found


def test_a_gateway_that_misses_schedulers_is_told() -> None:
    schedulers = [process(QUIET + 'x_workers{state="serving"} 1\n')] * 2
    one, none = (process(f"gateway_schedulers_connected {count}\n") for count in (1, 0))
    assert statuses(list(check_fleet(stack(one, *schedulers)))) == ["warning", "ok", "ok"]
    assert statuses(list(check_fleet(stack(none, *schedulers)))) == ["problem", "ok", "ok"]


@pytest.mark.parametrize(
    ("answer", "status", "part"),
    [
        (Answer(200, '{"chat_template":"x"}'), "ok", "are loaded"),
        (Answer(200, '{"chat_template":null}'), "warning", "no chat template"),
        (Answer(503, '{"error":{"message":"the tokenizer is being loaded"}}'), "problem", "being loaded"),
    ],
)
def test_a_card_without_tokenizer_or_template_is_told(answer: Answer, status: str, part: str) -> None:
    known = api('{"models":[{"id":"m","workers":1}]}', tokenizers={"m": answer})
    _, card = check_models(stack(api=known))
    assert (card.status, part in card.meaning) == (status, True)


@pytest.mark.parametrize(
    ("certificate", "expected"),
    [
        (Certificate(90.0), ["ok"]),
        (Certificate(5.0), ["warning"]),
        (Certificate(0.0, "certificate has expired"), ["problem"]),
        (Certificate(90.0, "hostname mismatch"), ["ok", "warning"]),
        (Certificate(None, fault="broken off"), ["warning"]),
    ],
)
def test_a_certificate_is_told_before_it_ends(certificate: Certificate, expected: list[str]) -> None:
    served = api(certificate=certificate)
    served = served._replace(process=served.process._replace(url="https://host:1"))
    found = [item for item in check_api(stack(api=served)) if item.check.startswith("certificate")]
    assert statuses(found) == expected


def test_a_key_that_travels_unencrypted_is_told() -> None:
    *_, found = check_api(stack(api=api(keyed=Answer(200), remote=True, exposed=True)))
    assert (found.status, "unencrypted" in found.meaning) == ("warning", True)


def test_loopback_is_known_in_all_its_forms() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "fe80::1%eth0")))


SMI = """\
if [ "$1" = -L ]; then echo "GPU 0: NVIDIA H100 (UUID: GPU-aaaaaaaa-0000-1111-2222-333344445555)"
else echo "Driver Version                            : 570.86.10"
     echo "CUDA Version                              : 12.8"; fi"""
H100 = Gpus(("GPU-aaaaaaaa-0000-1111-2222-333344445555",), "570.86.10", (12, 8))


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (SMI, H100),
        (
            "echo 'NVIDIA-SMI has failed: no driver'; exit 9",
            Gpus(fault="nvidia-smi: NVIDIA-SMI has failed: no driver"),
        ),
        (None, Gpus()),
    ],
)
def test_gpu_and_driver_are_read_from_their_own_tool(
    tmp_path: Path, script: str | None, expected: Gpus
) -> None:
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    assert find_driver({"PATH": str(tmp_path)}, devices=tmp_path) == expected


def test_a_device_without_its_tool_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    assert find_driver({"PATH": str(tmp_path)}, devices=tmp_path).fault


def test_the_build_of_torch_is_read_without_loading_it() -> None:
    cpu = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"
    cuda = "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n"
    assert parse_build(cpu) == Torch("2.13.0+cpu", None)
    assert parse_build(cuda) == Torch("2.13.0+cu130", (13, 0))


@pytest.mark.parametrize(
    ("gpus", "torch", "kernels", "expected"),
    [
        (Gpus(), Torch("2", None), Kernels(built=True, compiler=""), ["ok", "ok", "ok"]),
        (Gpus(), Torch("2", (12, 8)), Kernels(built=False, compiler="/g++"), ["ok", "ok", "ok"]),
        (Gpus(), Torch("2", None), Kernels(built=False, compiler=""), ["ok", "ok", "warning"]),
        (Gpus(), None, Kernels(built=False, compiler=""), ["ok"]),
        (H100, Torch("2", None), Kernels(built=False, compiler=""), ["ok", "problem"]),
        (H100, Torch("2", (13, 0)), Kernels(built=False, compiler=""), ["ok", "problem"]),
        (H100, Torch("2", (12, 9)), Kernels(built=False, compiler=""), ["ok", "ok"]),
        (Gpus(fault="no driver"), None, Kernels(built=False, compiler=""), ["problem"]),
    ],
)
def test_torch_has_to_fit_the_driver(
    gpus: Gpus, torch: Torch | None, kernels: Kernels, expected: list[str]
) -> None:
    assert statuses(list(check_machine(stack(machine=Machine((), gpus, torch, kernels))))) == expected


def test_gpus_that_no_worker_uses_are_told() -> None:
    machine = Machine((), H100, None, Kernels(built=True, compiler=""))
    started = worker('vllm:startup_seconds{phase="load"} 1\n')
    assert "every worker runs on the CPU" in only(list(check_gpus(stack(started, machine=machine)))).meaning
    assert list(check_gpus(stack(started))) == []
    assert list(check_gpus(stack(worker(""), machine=machine))) == []  # made-up tokens


def test_a_gpu_that_two_workers_have_is_told() -> None:
    on_a, on_b = (worker(f'vllm:gpu_info{{worker="w",uuid="GPU-{name}"}} 1\n') for name in "ab")
    found = only(list(check_gpus(stack(on_a, on_b, worker("")))))
    assert (found.status, found.meaning) == ("ok", "2 of 3 workers have one, each its own")
    found = only(list(check_gpus(stack(on_a, on_b, on_b._replace(address="host:2")))))
    assert (found.status, found.meaning) == (
        "warning",
        "GPU-b is shared by worker at host:1, worker at host:2",
    )


def test_disks_that_are_nearly_full_or_cannot_be_written_are_told() -> None:
    disks = (
        Disk("/a", 90 * GIB),
        Disk("/b", 2 * GIB),
        Disk("/c", 10),
        Disk("/d", 90 * GIB, "it cannot be written"),
    )
    machine = Machine(disks, Gpus(), None, Kernels(built=True, compiler=""))
    *found, _ = check_machine(stack(machine=machine))
    assert statuses(found) == ["ok", "warning", "problem", "problem"]
