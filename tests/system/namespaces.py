"""A network of hosts on one machine: a namespace for each, another for the switch, and faults on the way.

Nothing is made in the machine's own namespace but one end of a cable to the first host, for clients.
Deleting the namespaces takes everything away: interfaces, rules and routes.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CLIENT, CLIENT_SIDE_OF_FIRST_HOST = "198.18.77.1", "198.18.77.2"
"""Addresses of the cable for clients, of the range that is set aside for measuring networks."""

_CLONE_NEWNET = 0x40000000


class NetworkUnavailableError(Exception):
    """This machine does not let the tests make namespaces; the text says why."""


@dataclass(frozen=True)
class Place:
    """A namespace with one way out: `eth0`, at `address`, to the switch's port `port`."""

    name: str
    address: str
    port: str

    @property
    def within(self) -> tuple[str, ...]:
        """What to put before a command that is to run there, with mounts that end with it."""
        return "nsenter", f"--net=/run/netns/{self.name}", "unshare", "--mount"


@dataclass(frozen=True)
class Network:
    """Hosts on a switch. `prefix` begins the name of everything that was made."""

    prefix: str
    places: tuple[Place, ...]

    @property
    def switch(self) -> str:
        return f"{self.prefix}-switch"

    @property
    def namespaces(self) -> list[str]:
        return [self.switch, *(place.name for place in self.places)]

    def inhabitants(self) -> list[str]:
        """The processes within, while the namespaces are there."""
        own = {_inode(Path("/run/netns", name)) for name in self.namespaces}
        found = [pid for pid in _processes() if _inode(Path(f"/proc/{pid}/ns/net")) in own]
        return [f"process {pid}: {_command_line(pid)}" for pid in found]

    @contextmanager
    def lossy(self, *ways: tuple[Place, Place], share: float = 1.0) -> Iterator[None]:
        """Lose this share of what goes from the first to the second of each pair, at random."""
        rules = [_losing(*way, share) for way in ways]
        for name, rule in rules:
            _run("nsenter", f"--net=/run/netns/{name}", "iptables", "-t", "raw", "-I", *rule)
        try:
            yield
        finally:
            for name, rule in rules:
                _run("nsenter", f"--net=/run/netns/{name}", "iptables", "-t", "raw", "-D", *rule)

    @contextmanager
    def unplugged(self, place: Place) -> Iterator[None]:
        """Take a host's cable out: both sides lose their carrier."""
        _ip("-n", self.switch, "link", "set", place.port, "down")
        try:
            yield
        finally:
            _ip("-n", self.switch, "link", "set", place.port, "up")


def _losing(sender: Place, receiver: Place, share: float) -> tuple[str, tuple[str, ...]]:
    """The namespace and the rule. The table comes before connections are known and addresses translated."""
    chance = () if share >= 1 else ("-m", "statistic", "--mode", "random", "--probability", str(share))
    rule = ("PREROUTING", "-i", "eth0", "-s", sender.address, *chance, "-j", "DROP")
    return receiver.name, rule


@contextmanager
def network(names: Sequence[str]) -> Iterator[Network]:
    """Hosts of these names at 10.77.0.1, 10.77.0.2 ... Raises `NetworkUnavailableError`."""
    if os.geteuid() != 0:
        raise NetworkUnavailableError("making network namespaces needs root")
    # The names of interfaces have 15 characters at most.
    prefix = f"sf{os.getpid() % 10**6}"
    places = tuple(
        Place(f"{prefix}-{name}", f"10.77.0.{number}", f"port{number}")
        for number, name in enumerate(names, start=1)
    )
    made = Network(prefix, places)
    try:
        _plug_together(made)
        yield made
    finally:
        if Path("/sys/class/net", prefix).exists():
            _ip("link", "delete", prefix)
        for name in made.namespaces:
            if Path("/run/netns", name).exists():
                _ip("netns", "delete", name)


def _plug_together(made: Network) -> None:
    try:
        _ip("netns", "add", made.switch)
        _ip("-n", made.switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", made.switch, "link", "set", "switch", "up")
        for place in made.places:
            _ip("netns", "add", place.name)
            _ip("-n", place.name, "link", "set", "lo", "up")
            cable = ("link", "add", place.port, "type", "veth", "peer", "name", "eth0", "netns", place.name)
            _ip("-n", made.switch, *cable)
            _ip("-n", made.switch, "link", "set", place.port, "master", "switch", "up")
            _ip("-n", place.name, "address", "add", f"{place.address}/24", "dev", "eth0")
            _ip("-n", place.name, "link", "set", "eth0", "up")
        first = made.places[0].name
        _ip("link", "add", made.prefix, "type", "veth", "peer", "name", "clients", "netns", first)
        _ip("address", "add", f"{CLIENT}/30", "dev", made.prefix)
        _ip("link", "set", made.prefix, "up")
        _ip("-n", first, "address", "add", f"{CLIENT_SIDE_OF_FIRST_HOST}/30", "dev", "clients")
        _ip("-n", first, "link", "set", "clients", "up")
    except subprocess.CalledProcessError as error:
        raise NetworkUnavailableError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
    except FileNotFoundError as error:
        raise NetworkUnavailableError(f"there is no {error.filename} (apt install iproute2)") from error


def socket_within(namespace: str, family: int, kind: int, protocol: int) -> socket.socket:
    """A socket that belongs to a namespace, wherever its user is. Raises OSError."""
    made: list[socket.socket | OSError] = []

    def make() -> None:
        # Only this thread goes there, and it ends there.
        try:
            with Path("/run/netns", namespace).open("rb") as handle:
                library = ctypes.CDLL(None, use_errno=True)
                if library.setns(handle.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
            made.append(socket.socket(family, kind, protocol))
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    found = made[0]
    if isinstance(found, OSError):
        raise found
    return found


def leftovers(prefix: str, *words: str) -> list[str]:
    """What there still is of a network, and processes and mounts that name one of `words`."""
    found = [f"namespace {path.name}" for path in Path("/run/netns").glob(f"{prefix}-*")]
    found += [f"interface {name}" for _, name in socket.if_nameindex() if name.startswith(prefix)]
    wanted = re.compile("|".join(map(re.escape, (f"{prefix}-", *words))))
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [f"mount {line}" for line in mounts if wanted.search(line)]
    lines = [f"process {pid}: {_command_line(pid)}" for pid in _processes()]
    return found + [line for line in lines if wanted.search(line)]


def _processes() -> list[int]:
    own = os.getpid()
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if int(path.name) != own]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""  # it has ended


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0  # it has ended


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
