"""Keys of the links between gateways, scheduler and workers: CURVE (Curve25519), as ZeroMQ has it.

Each role has one file, `DIR/ROLE/link.keys`, in TOML: its own secret key, and the public keys of those that
it talks to. The scheduler's names the gateways and the workers that may come in; the others' name the
scheduler. `sfllm keys links DIR` makes them, or `python -m sfllm.link_keys DIR` where that is not installed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import zmq

FILE_NAME = "link.keys"
ROLES = ("scheduler", "gateway", "worker")
CLIENT_ROLES = ("gateway", "worker")
OWNER_ONLY, OWNER_ONLY_FOLDER = 0o600, 0o700
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_OPEN_TO_OTHERS = 0o027

ClientRole = Literal["gateway", "worker"]


class LinkKeysError(ValueError):
    """A file of keys cannot be used or made; the text says why and never has a secret in it."""


class ClientKeys(NamedTuple):
    """What a gateway or a worker needs: its own pair, and who the scheduler is. All in Z85."""

    secret: bytes
    scheduler: bytes

    @property
    def public(self) -> bytes:
        """The key by which the scheduler knows it."""
        return zmq.curve_public(self.secret)


class SchedulerKeys(NamedTuple):
    """What the scheduler needs: its own secret key, and the public keys of its peers by their names."""

    secret: bytes
    gateways: Mapping[str, bytes]
    workers: Mapping[str, bytes]

    @property
    def public(self) -> bytes:
        """The key by which others know it."""
        return zmq.curve_public(self.secret)


def read_client_keys(file: str | Path, role: str) -> ClientKeys:
    """The keys of a gateway or of a worker.

    Raises `LinkKeysError`, also when others than owner and group may read the file.
    """
    content = _content(Path(file), role)
    return ClientKeys(_key(file, content, "secret-key"), _key(file, content, "scheduler-key"))


def read_scheduler_keys(file: str | Path) -> SchedulerKeys:
    """Raises `LinkKeysError`, also when others than owner and group may read the file."""
    content = _content(Path(file), "scheduler")
    peers = [_peers(file, content, name) for name in ("gateways", "workers")]
    return SchedulerKeys(_key(file, content, "secret-key"), *peers)


def make_link_keys(directory: Path, *, renew: bool = False) -> bool:
    """Make a set of keys, one for each role; False when there is a whole one, which stays.

    Raises `LinkKeysError` when only a part of a set is there.
    """
    files = [key_file(directory, role) for role in ROLES]
    missing = [str(file) for file in files if not file.exists()]
    if not missing and not renew:
        read_scheduler_keys(files[0])
        return False
    if missing and len(missing) < len(files) and not renew:
        raise LinkKeysError(
            f"{', '.join(missing)} missing, but others of the set are there: put them back, or make "
            "all of them anew with --renew"
        )
    pairs = {role: _new_pair() for role in ROLES}
    public = {role: pair[1] for role, pair in pairs.items()}
    for role in CLIENT_ROLES:
        _write(key_file(directory, role), _client_text(role, role, pairs[role][0], public["scheduler"]))
    keys = SchedulerKeys(pairs["scheduler"][0], {"gateway": public["gateway"]}, {"worker": public["worker"]})
    # Last, because a whole set is known by it.
    _write(key_file(directory, "scheduler"), _scheduler_text(keys))
    return True


def add_link_key(directory: Path, role: ClientRole, name: str) -> Path:
    """Make keys of one more peer, by which it can be told and sent away apart from others; its file.

    Raises `LinkKeysError` when there is no set, or one of that name.
    """
    if not _NAME.fullmatch(name):
        raise LinkKeysError(f"{name!r} is no name: small letters, digits and hyphens, 63 at most")
    file = key_file(directory, "scheduler")
    keys = read_scheduler_keys(file)
    name = f"{role}-{name}"
    own = key_file(directory, name)
    if name in {**keys.gateways, **keys.workers} or own.exists():
        raise LinkKeysError(f"there are keys of {name} already")
    secret, public = _new_pair()
    _write(own, _client_text(role, name, secret, keys.public))
    if role == "gateway":
        keys = keys._replace(gateways={**keys.gateways, name: public})
    else:
        keys = keys._replace(workers={**keys.workers, name: public})
    _write(file, _scheduler_text(keys))
    return own


def key_file(directory: Path, name: str) -> Path:
    """The file of a role, or of a peer that was added."""
    return directory / name / FILE_NAME


def kubernetes_secret(directory: Path, name: str) -> str:
    """A manifest with the files of the three roles. Raises `LinkKeysError` when one is missing."""
    lines = ["apiVersion: v1", "kind: Secret", "type: Opaque", "metadata:", f"  name: {name}", "stringData:"]
    for role in ROLES:
        try:
            text = key_file(directory, role).read_text(encoding="utf-8")
        except OSError as error:
            raise LinkKeysError(f"{error.filename}: {error.strerror}") from error
        lines += [f"  {role}.keys: |", *(f"    {line}" for line in text.splitlines())]
    return "\n".join(lines) + "\n"


def _new_pair() -> tuple[bytes, bytes]:
    public, secret = zmq.curve_keypair()
    return secret, public


def _content(file: Path, role: str) -> dict[str, object]:
    try:
        mode = file.stat().st_mode
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise LinkKeysError(f"{file} cannot be read: {reason}") from error
    if mode & _OPEN_TO_OTHERS:
        raise LinkKeysError(
            f"{file} is open to others (mode {mode & 0o777:o}): chmod 600, or 640 for its group"
        )
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # The parser's own text would show the line, which may be the secret.
        raise LinkKeysError(f"{file} is not TOML: make it anew with `sfllm keys links`") from error
    if content.get("role") != role:
        raise LinkKeysError(f"{file} has the keys of a {content.get('role', 'stranger')}, not of a {role}")
    return content


def _key(file: str | Path, content: Mapping[str, object], name: str) -> bytes:
    value = content.get(name)
    if not isinstance(value, str) or not _KEY.fullmatch(value):
        raise LinkKeysError(f"{file} has no sound {name}: 40 characters of Z85")
    try:
        zmq.curve_public(value.encode())  # five characters may say more than 32 bits can hold
    except zmq.ZMQError as error:
        raise LinkKeysError(f"{file} has no sound {name}: it is not Z85") from error
    return value.encode()


def _peers(file: str | Path, content: Mapping[str, object], name: str) -> dict[str, bytes]:
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise LinkKeysError(f"{file}: {name} must be a table of names and public keys")
    return {peer: _key(f"{file}, [{name}]", table, peer) for peer in table}


def _client_text(role: str, name: str, secret: bytes, scheduler: bytes) -> str:
    return (
        f"# Keys of a {role}'s links to the scheduler. Whoever has this file can be one: keep it secret.\n"
        f'role = "{role}"\nname = "{name}"\n'
        f'secret-key = "{secret.decode()}"\nscheduler-key = "{scheduler.decode()}"\n'
    )


def _scheduler_text(keys: SchedulerKeys) -> str:
    tables = [
        f"\n[{kind}]\n" + "".join(f'"{name}" = "{key.decode()}"\n' for name, key in peers.items())
        for kind, peers in (("gateways", keys.gateways), ("workers", keys.workers))
    ]
    return (
        "# Keys of the scheduler's links: its secret, and the public keys of those that may come in.\n"
        "# A line that is taken away cuts its peer off within a second, without a restart.\n"
        f'role = "scheduler"\nsecret-key = "{keys.secret.decode()}"\n' + "".join(tables)
    )


def _write(file: Path, text: str) -> None:
    """Put a whole file in place at once, so that whoever reads meanwhile sees the old or the new one."""
    try:
        file.parent.mkdir(mode=OWNER_ONLY_FOLDER, parents=True, exist_ok=True)
        new = file.with_name(f".{file.name}.{os.getpid()}")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, OWNER_ONLY)
        with os.fdopen(descriptor, "w", encoding="utf-8") as output:
            output.write(text)
        new.replace(file)
    except OSError as error:
        raise LinkKeysError(f"{error.filename or file} cannot be written: {error.strerror}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that both commands have."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="where the folder of each role is made")
    parser.add_argument("--renew", action="store_true", help="make all keys anew, those that were added too")
    parser.add_argument(
        "--add",
        nargs=2,
        metavar=("ROLE", "NAME"),
        help="keys of one more gateway or worker, in DIR/ROLE-NAME, which the scheduler then lets in",
    )
    parser.add_argument(
        "--kubernetes", metavar="SECRET", help="also print the manifest of a Secret of that name"
    )


def run(arguments: argparse.Namespace) -> None:
    """Do what the flags say, and say on standard error what was done. Raises `LinkKeysError`."""
    directory: Path = arguments.directory
    if arguments.add and (arguments.renew or arguments.kubernetes):
        raise LinkKeysError("--add goes by itself")
    if arguments.add:
        role, name = arguments.add
        if role not in CLIENT_ROLES:
            raise LinkKeysError(f"{role!r} cannot be added: gateway or worker")
        print(f"made {add_link_key(directory, role, name)}", file=sys.stderr)
        return
    made = make_link_keys(directory, renew=arguments.renew)
    print(f"{'made keys in' if made else 'there are keys already in'} {directory}", file=sys.stderr)
    if arguments.kubernetes:
        print(kubernetes_secret(directory, arguments.kubernetes), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Make keys; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sfllm.link_keys", description=make_link_keys.__doc__)
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except LinkKeysError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
