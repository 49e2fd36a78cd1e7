"""uvicorn's HTTP protocol with the bounds that it lacks: on heads, their time, and requests sent ahead."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.http_io import ABORT, error_json

MAX_HEAD_BYTES = 64 * 2**10
HEAD_SECONDS = 60.0
TLS_END_SECONDS = 0.5
MAX_PIPELINED = 32
"""Requests that may wait on one connection for the answer to the one before."""


class Connection(HttpToolsProtocol):
    """One connection. Requests on it can cut it off (`ABORT`); a client that goes too far is cut off."""

    _head_bytes = 0
    _in_body = False
    _head_timer: asyncio.TimerHandle | None = None
    _answered: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        """Wait for a first request, not for ever."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request that is being answered; uvicorn tells the one that came last."""
        self._stop_timer()
        self.pipeline.clear()
        answered = self._answered
        if answered is not None and not answered.response_complete:
            answered.disconnected = True
            answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to no complete head and no body."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._in_body:
            self._head_bytes = 0
        elif self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse_head()

    def on_message_begin(self) -> None:
        """A request begins: tell it how to abort."""
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: {"abort": self.transport.abort}}
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def on_headers_complete(self) -> None:
        """The head is here; its request runs, or waits for those before it."""
        self._stop_timer()
        self._in_body = True
        super().on_headers_complete()
        if not self.pipeline:
            self._answered = self.cycle
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()

    def on_message_complete(self) -> None:
        """What follows is another request's head."""
        self._in_body = False
        self._head_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on to the request that waits longest."""
        self._answered = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()

    def shutdown(self) -> None:
        """The server leaves. What an idle client has to do to end TLS, and may not do, is not waited for."""
        super().shutdown()
        if self.transport.is_closing() and self.transport.get_extra_info("sslcontext") is not None:
            self.loop.call_later(TLS_END_SECONDS, self.transport.abort)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse_head(self) -> None:
        """Answer what cannot become a request, if nobody before it waits for an answer, and hang up."""
        if self.cycle is None or self.cycle.response_complete:
            error = ServiceError(ErrorCode.INVALID_REQUEST, f"more than {MAX_HEAD_BYTES} bytes of headers")
            body = error_json(error)
            lines = (
                f"HTTP/1.1 {error.http.status} Bad Request",
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
                "Connection: close",
            )
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
