"""A service whose file of link keys cannot be used ends with status 2 and one line that names the file."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos.ports import free_ports

from sfllm.link_keys import ROLES, key_file, make_link_keys

PATIENCE_SECONDS = 60.0


def not_z85(file: Path) -> None:
    """All characters are of Z85, but each five of them mean more than 32 bits can hold."""
    file.write_text(re.sub('secret-key = ".*"', f'secret-key = "{"#" * 40}"', file.read_text()))


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "cannot be read: No such file"),
    "a folder": (a_folder, "cannot be read: Is a directory"),
    "no TOML": (lambda file: file.write_text("secret"), "is not TOML"),
    "no keys": (not_z85, "it is not Z85"),
    "open to others": (lambda file: file.chmod(0o644), "open to others"),
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_link_keys(folder)
    return folder


def ends(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and what was printed, on both ways out."""
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out + err


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def one(*command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield one
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=PATIENCE_SECONDS)


@pytest.mark.parametrize("role", ROLES)
def test_a_service_says_in_one_line_what_is_wrong_with_its_keys(
    role: str, keys: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    secret = key_file(keys, role).read_text().split('secret-key = "')[1][:40]
    flags = {"worker": ["--mock"], "gateway": [f"--port={free_ports(1)[0]}"]}.get(role, [])
    processes = {}
    for number, (fault, (spoil, _)) in enumerate(FAULTS.items()):
        file = tmp_path / f"{number}.keys"
        shutil.copy(key_file(keys, role), file)
        spoil(file)
        processes[fault] = file, start(f"sfllm_{role}", f"--link-keys={file}", *flags)
    for fault, (file, process) in processes.items():
        status, printed = ends(process)
        assert status == 2, (fault, printed)
        [line] = printed.splitlines()
        assert str(file) in line
        assert FAULTS[fault][1] in line
        assert secret not in line


@pytest.mark.parametrize("role", ROLES)
def test_serve_says_it_before_it_starts_anything(
    role: str, keys: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    shutil.copytree(keys, tmp_path, dirs_exist_ok=True)
    key_file(tmp_path, role).chmod(0o604)
    status, printed = ends(start("sfllm_cli", "serve", "--mock", "--port=0", f"--link-keys={tmp_path}"))
    assert status == 2, printed
    [line] = printed.splitlines()
    assert f"{key_file(tmp_path, role)} is open to others" in line


def test_serve_gives_each_process_its_own_file(
    keys: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Over TCP, as for workers on other hosts: a stack without the right keys would never get ready."""
    ports = free_ports(3)
    kinds = ("gateway", "worker", "asset")
    addresses = [f"--{kind}-address=tcp://127.0.0.1:{port}" for kind, port in zip(kinds, ports, strict=True)]
    process = start("sfllm_cli", "serve", "--mock", "--port=0", f"--link-keys={keys}", *addresses)
    assert process.stdout is not None
    assert "sfllm serves mock" in process.stdout.readline() + process.stdout.readline()
    process.terminate()
    status, printed = ends(process)
    assert status == 0, printed
