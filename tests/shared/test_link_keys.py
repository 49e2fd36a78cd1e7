"""Files of link keys: whole or not at all, for their owner alone, and never shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
import zmq

from sfllm.link_keys import (
    LinkKeysError,
    SchedulerKeys,
    add_link_key,
    key_file,
    main,
    make_link_keys,
    read_client_keys,
    read_scheduler_keys,
)


def secrets_of(directory: Path) -> list[str]:
    lines = [line for file in directory.rglob("link.keys") for line in file.read_text().splitlines()]
    return [line.split('"')[1] for line in lines if line.startswith("secret-key")]


def test_a_set_fits_together(tmp_path: Path) -> None:
    assert make_link_keys(tmp_path)
    scheduler = read_scheduler_keys(key_file(tmp_path, "scheduler"))
    gateway = read_client_keys(key_file(tmp_path, "gateway"), "gateway")
    worker = read_client_keys(key_file(tmp_path, "worker"), "worker")
    assert scheduler == SchedulerKeys(
        scheduler.secret, {"gateway": gateway.public}, {"worker": worker.public}
    )
    assert gateway.scheduler == worker.scheduler == zmq.curve_public(scheduler.secret)
    assert len({gateway.secret, worker.secret, scheduler.secret}) == 3


def test_only_the_owner_may_read_them(tmp_path: Path) -> None:
    make_link_keys(tmp_path / "new")
    for file in (tmp_path / "new").rglob("link.keys"):
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700


def test_a_whole_set_stays_and_is_made_anew_only_on_demand(tmp_path: Path) -> None:
    make_link_keys(tmp_path)
    before = secrets_of(tmp_path)
    assert not make_link_keys(tmp_path)
    assert secrets_of(tmp_path) == before
    assert make_link_keys(tmp_path, renew=True)
    assert not set(secrets_of(tmp_path)) & set(before)


@pytest.mark.parametrize("role", ["scheduler", "gateway", "worker"])
def test_a_part_of_a_set_is_an_error_and_changes_nothing(tmp_path: Path, role: str) -> None:
    make_link_keys(tmp_path)
    key_file(tmp_path, role).unlink()
    before = secrets_of(tmp_path)
    with pytest.raises(LinkKeysError, match=f"{role}.*missing"):
        make_link_keys(tmp_path)
    assert secrets_of(tmp_path) == before


def test_a_peer_that_is_added_is_let_in_beside_the_others(tmp_path: Path) -> None:
    make_link_keys(tmp_path)
    before = read_scheduler_keys(key_file(tmp_path, "scheduler"))
    host = read_client_keys(add_link_key(tmp_path, "worker", "host-b"), "worker")
    edge = read_client_keys(add_link_key(tmp_path, "gateway", "edge"), "gateway")
    after = read_scheduler_keys(key_file(tmp_path, "scheduler"))
    assert after.secret == before.secret
    assert after.workers == {**before.workers, "worker-host-b": host.public}
    assert after.gateways == {**before.gateways, "gateway-edge": edge.public}
    with pytest.raises(LinkKeysError, match="already"):
        add_link_key(tmp_path, "worker", "host-b")


@pytest.mark.parametrize("name", ["", "../x", "A", "a b", "-a", "a" * 64])
def test_a_name_that_cannot_be_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    make_link_keys(tmp_path)
    with pytest.raises(LinkKeysError, match="name"):
        add_link_key(tmp_path, "worker", name)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o666, 0o777])
def test_a_file_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    make_link_keys(tmp_path)
    file = key_file(tmp_path, "worker")
    file.chmod(mode)
    with pytest.raises(LinkKeysError, match="chmod"):
        read_client_keys(file, "worker")
    file.chmod(0o640)
    read_client_keys(file, "worker")


FAULTS: dict[str, Callable[[str], str]] = {
    "no TOML": lambda text: text + "secret-key = half a string\n",
    "a short key": lambda text: text.replace('secret-key = "', 'secret-key = "x'),
    "no key": lambda text: text.replace("secret-key", "secret"),
    "another role": lambda text: text.replace('role = "worker"', 'role = "gateway"'),
    "nothing": lambda _text: "",
    "a number": lambda text: text.replace("scheduler-key", "old") + "scheduler-key = 5\n",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_sound_is_named_and_its_secret_is_not(tmp_path: Path, fault: str) -> None:
    make_link_keys(tmp_path)
    file = key_file(tmp_path, "worker")
    secret = file.read_text().split('secret-key = "')[1][:40]
    file.write_text(FAULTS[fault](file.read_text()))
    with pytest.raises(LinkKeysError) as error:
        read_client_keys(file, "worker")
    assert str(file) in str(error.value)
    assert secret[1:30] not in repr(error.value)


def test_a_scheduler_with_an_unsound_peer_is_refused(tmp_path: Path) -> None:
    make_link_keys(tmp_path)
    file = key_file(tmp_path, "scheduler")
    file.write_text(file.read_text() + '"bad" = "short"\n')
    with pytest.raises(LinkKeysError, match="bad"):
        read_scheduler_keys(file)


def test_the_command_makes_keeps_and_adds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(tmp_path / "links")
    assert main([directory]) == 0
    assert main([directory]) == 0
    assert main([directory, "--add", "worker", "b"]) == 0
    assert main([directory, "--add", "scheduler", "b"]) == 1
    assert main([directory, "--add", "worker", "c", "--renew"]) == 1
    (tmp_path / "links" / "gateway" / "link.keys").unlink()
    assert main([directory]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert not any(secret in shown.err for secret in secrets_of(tmp_path))


def test_a_secret_of_kubernetes_has_the_three_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--kubernetes", "sfllm-links"]) == 0
    manifest = yaml.safe_load(capsys.readouterr().out)
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("Secret", "sfllm-links")
    for role in ("scheduler", "gateway", "worker"):
        assert manifest["stringData"][f"{role}.keys"] == key_file(tmp_path, role).read_text()
