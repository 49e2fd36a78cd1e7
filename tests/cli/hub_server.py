"""The part of a model hub's HTTP API that fetching a snapshot uses, over a dictionary of files."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by id, each a dictionary from path to content; what was downloaded is recorded."""

    repositories: dict[str, dict[str, bytes]]
    url: str = ""
    revisions: tuple[str, ...] = ("main", COMMIT)
    downloaded: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path."""
        for name, files in self.repositories.items():
            api = f"/api/models/{name}"
            if path.startswith((f"{api}/revision/", f"{api}/tree/")):
                kind, revision = path.removeprefix(f"{api}/").partition("?")[0].split("/", 1)
                if revision not in self.revisions:
                    return 404, {"X-Error-Code": "RevisionNotFound"}, b""
                return self._json(self._info(name, files) if kind == "revision" else self._tree(files))
            for file, content in files.items():
                if any(path == f"/{name}/resolve/{revision}/{file}" for revision in self.revisions):
                    etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
                    return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _info(self, name: str, files: dict[str, bytes]) -> dict[str, Any]:
        return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}

    def _tree(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        return [
            {
                "type": "file",
                "path": file,
                "size": len(content),
                "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
            }
            for file, content in files.items()
        ]

    def _json(self, value: Any) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """`hub` at a free port of loopback."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
                if "/resolve/" in self.path and status == 200:
                    hub.downloaded.append(self.path.split("/resolve/")[1].split("/", 1)[1])

        do_HEAD = do_GET  # noqa: N815 - the base class names it so

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
