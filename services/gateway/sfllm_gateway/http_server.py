"""Serving HTTP until told to stop, and leaving without losing a connection.

The way out: readiness turns 503 and every answer says `Connection: close` at once. Connections that
are on their way in are taken in, then the listener closes, and from then on new ones go to the
gateways that share the port. For `shutdown_delay_seconds` open connections are served as before,
so that each client hears `Connection: close`; then idle ones are closed, and what is being
answered has `drain_seconds` to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import socket
import ssl
import struct
from collections.abc import Iterator

import structlog
import uvicorn
from starlette.types import ASGIApp

from sfllm.errors import ErrorCode, ServiceError
from sfllm.settings import GatewaySettings
from sfllm_gateway.connection import Connection
from sfllm_gateway.endpoints import GatewayState

SEND_BUFFER_BYTES = 64 * 2**10
"""What the kernel keeps for a client that does not read; unset it would be megabytes each."""

BACKLOG = 2048
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2, those with forward secrecy and authenticated encryption; TLS 1.3 has no others."""

FAREWELL_SECONDS = 1.0
HANDSHAKE_SECONDS = 0.2
"""A connection whose handshake has begun is there after so long, or its client tries again."""
TLS_HANDSHAKE_SECONDS = 2.0
"""What a client that came just before the listener closed has for its part of TLS: leaving waits for it."""

SO_ATTACH_FILTER = 26
NO_NEW_CONNECTIONS = (
    (0x30, 0, 0, 13),  # load the byte of TCP flags
    (0x54, 0, 0, 0x12),  # of which SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone:
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # anything else: keep
)
"""A packet filter (struct sock_filter of Linux: code, two jumps, operand)."""

log = structlog.get_logger()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose port further gateway processes may share. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def check_certificate(settings: GatewaySettings) -> None:
    """Raise ValueError, in words for the operator, for a certificate or a key that cannot be used."""
    if settings.tls_cert_file is None:
        return
    try:
        # An encrypted key would have its password asked for at a terminal that may not be there.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            settings.tls_cert_file, settings.tls_key_file, password=lambda: b""
        )
    except OSError as error:
        raise ValueError(f"--tls-cert-file and --tls-key-file: {error}") from error


def refuse_new(listener: socket.socket) -> None:
    """Let no handshake begin any more: its client tries again, and then this listener is closed.

    Where the system has no such filter nothing changes: a connection that comes between the last look
    and the close is then reset.
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in NO_NEW_CONNECTIONS))
    program = struct.pack("HL", len(NO_NEW_CONNECTIONS), ctypes.addressof(code))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


async def serve_http(app: ASGIApp, state: GatewayState, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT and then leave; a second signal ends everything at once."""
    server = HttpServer(app, state, listener)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.leave)
    host, port = listener.getsockname()[:2]
    log.info("gateway listening", host=host, port=port)
    try:
        await server.serve(sockets=[listener])
    finally:
        server.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


class HttpServer(uvicorn.Server):
    """uvicorn, but for how it leaves. Owns the listener, and the task that leaves until `close`."""

    def __init__(self, app: ASGIApp, state: GatewayState, listener: socket.socket) -> None:
        settings = state.settings
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ssl_certfile=settings.tls_cert_file,
                ssl_keyfile=settings.tls_key_file,
                ssl_ciphers=CIPHERS,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=int(settings.drain_seconds + 2 * FAREWELL_SECONDS),
            )
        )
        self._state = state
        self._listener = listener
        self._leaving: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone: the process decides how to leave."""
        yield

    def leave(self) -> None:
        """Begin to leave. Asked a second time: end at once."""
        if self._leaving is None:
            log.info("draining", open_requests=self._state.open_requests)
            self._state.draining = True
            self._leaving = asyncio.get_running_loop().create_task(self._leave())
            return
        log.warning("told again to stop: ending at once", open_requests=self._state.open_requests)
        self._leaving.cancel()
        self.should_exit = self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def close(self) -> None:
        """Stop leaving: it is done."""
        if self._leaving is not None:
            self._leaving.cancel()

    async def _leave(self) -> None:
        settings = self._state.settings
        refuse_new(self._listener)
        await asyncio.sleep(min(HANDSHAKE_SECONDS, settings.shutdown_delay_seconds))
        await self._close_listener()
        await asyncio.sleep(max(settings.shutdown_delay_seconds - HANDSHAKE_SECONDS, 0))
        self.should_exit = True  # idle connections are closed now, the others with the answer they are at
        await asyncio.sleep(settings.drain_seconds)
        self._state.fail_all(
            ServiceError(
                ErrorCode.SERVICE_UNAVAILABLE, "this gateway is shutting down", retry_after_seconds=1
            )
        )

    async def _close_listener(self) -> None:
        """Take in what the kernel has accepted, and close before it accepts more."""
        accepted = []
        with contextlib.suppress(BlockingIOError):
            while True:
                accepted.append(self._listener.accept()[0])
        for server in self.servers:
            server.close()
        self._listener.close()
        await asyncio.gather(*map(self._take_in, accepted))

    async def _take_in(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        context = self.config.ssl
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol,
                connection,
                ssl=context,
                ssl_handshake_timeout=None if context is None else TLS_HANDSHAKE_SECONDS,
            )
        except OSError as error:  # its client left, or says nothing
            log.debug("connection lost before it was served", reason=str(error))
            connection.close()

    def _protocol(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)
