"""Whether a TCP port can be had, asked before anything starts."""

from __future__ import annotations

import socket

from sfllm_cli.errors import CommandError


def check_free(host: str, port: int, flag: str) -> None:
    """Raise `CommandError` when `port` of `host` cannot be bound; `flag` is what the user would change."""
    try:
        _bound(host, port).close()
    except OSError as error:
        raise CommandError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. "
            f"Stop what uses it, or choose another: {flag} {port + 1 if port < 65535 else port - 1}"
        ) from error


def free_port(host: str) -> int:
    """A port of `host` that nothing uses at the moment. Raises `CommandError`."""
    try:
        with _bound(host, 0) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        raise CommandError(
            f"cannot listen on {host}: {error.strerror or error}; choose another --host"
        ) from error


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # As servers do, so that connections of an earlier run that still close are no obstacle.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener
