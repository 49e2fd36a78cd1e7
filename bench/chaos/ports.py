"""Ports for servers that die and come back."""

from __future__ import annotations

import random
import socket
from pathlib import Path

FIRST_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Consecutive ports of loopback that are free now.

    They lie below those that the kernel gives to outgoing connections, or one of these could take the
    port of a server that is being restarted, or even connect to itself there.
    """
    try:
        end = int(FIRST_EPHEMERAL.read_text().split()[0])
    except OSError:
        end = 32768
    for _ in range(200):
        first = random.randrange(max(1024, end - 20000), end - count)
        ports = list(range(first, first + count))
        if all(_is_free(port) for port in ports):
            return ports
    raise RuntimeError(f"no {count} free ports below {end}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
