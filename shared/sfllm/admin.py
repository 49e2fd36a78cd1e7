"""A process's own `/health`, `/ready`, `/metrics` and `/version`, from a thread, so that work delays none."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable

from sfllm.metrics import CONTENT_TYPE, Metrics
from sfllm.version import VERSIONS

REQUEST_TIMEOUT_SECONDS = 5.0


class AdminServer:
    """Owns the listening socket and its thread from construction until `close`.

    `problem` says why the process cannot go on, `unready` why it cannot serve at the moment; None when
    it can. Both are called from the thread. Raises OSError when the port is taken.
    """

    def __init__(
        self,
        host: str,
        port: int,
        metrics: Metrics,
        problem: Callable[[], str | None],
        unready: Callable[[], str | None] = lambda: None,
    ) -> None:
        class Handler(_AdminHandler):
            owner = self

        self._metrics = metrics
        self._problem = problem
        self._unready = unready
        self._server = http.server.ThreadingHTTPServer((host, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="admin", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=REQUEST_TIMEOUT_SECONDS)

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body for a GET of `path`."""
        if path == "/metrics":
            return 200, CONTENT_TYPE, self._metrics.render()
        if path == "/health":
            return _answer(self._problem(), "healthy")
        if path == "/ready":
            return _answer(self._problem() or self._unready(), "ready")
        if path == "/version":
            return 200, "application/json", json.dumps(VERSIONS).encode()
        message = b'{"error":{"message":"try /health, /ready, /metrics or /version"}}'
        return 404, "application/json", message


def _answer(problem: str | None, good: str) -> tuple[int, str, bytes]:
    body = {"status": good if problem is None else f"un{good}", "timestamp": int(time.time())}
    if problem is not None:
        body["reason"] = problem
    return (200 if problem is None else 503), "application/json", json.dumps(body).encode()


class _AdminHandler(http.server.BaseHTTPRequestHandler):
    owner: AdminServer
    timeout = REQUEST_TIMEOUT_SECONDS

    def do_GET(self) -> None:
        status, content_type, body = self.owner.answer(self.path.partition("?")[0])
        try:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            # Whoever asked waits no more, as Prometheus after its timeout: nothing went wrong here.
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Scrapes every few seconds are not worth a log line each."""
