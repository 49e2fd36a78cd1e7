"""An address where every connection is ended at once must not stop links to other addresses."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import PATIENCE_SECONDS, Services

TRIES = 2500
"""At 2,000 pieces of news that nobody takes, libzmq's thread stops for all sockets of its process."""

HASTY = "import sfllm.sockets as s; s.RECONNECT_MILLISECONDS = s.RECONNECT_LONGEST_MILLISECONDS = 1"
"""It comes to that in minutes at the usual pace, and in seconds at this one."""


class SlammingDoor:
    """A port on loopback. From `open` on, what comes in is ended before a word was said."""

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._slam)
        self.slammed_often = threading.Event()

    def open(self) -> None:
        self._listener.listen()
        self._thread.start()

    def _slam(self) -> None:
        slammed = 0
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                self._listener.accept()[0].close()
                slammed += 1
                if slammed == TRIES:
                    self.slammed_often.set()

    def close(self) -> None:
        if self._thread.ident is not None:
            self._listener.shutdown(socket.SHUT_RDWR)  # or accept would go on
            self._thread.join()
        self._listener.close()


@pytest.fixture
def doors() -> Iterator[dict[str, dict[str, SlammingDoor]]]:
    """Those that each service is told of besides the scheduler's."""
    made = {
        service: {link: SlammingDoor() for link in (service, "asset")} for service in ("gateway", "worker")
    }
    yield made
    for of_service in made.values():
        for door in of_service.values():
            door.close()


@pytest.fixture
def services(tmp_path: Path, doors: dict[str, dict[str, SlammingDoor]]) -> Iterator[Services]:
    made = Services(tmp_path)
    # With a shorter lease a worker that is stuck would give its place up, look at its links, and go on.
    made.start("scheduler", "scheduler", f"--lease-seconds={10 * PATIENCE_SECONDS}")
    for service, own in doors.items():
        flags = ["--mock", "--served-model-name=m"] if service == "worker" else [f"--port={made.api}"]
        for link, door in own.items():
            flags += [f"--{link}-address", f"tcp://127.0.0.1:{made.links[link]}", door.address]
        made.start(service, service, *flags, changed=HASTY)
    made.wait("gateway", lambda seen: seen[0] == 200)
    yield made
    made.close()


def complete(services: Services) -> int:
    body = json.dumps({"model": "m", "prompt": "hi", "max_tokens": 5}).encode()
    url = f"http://127.0.0.1:{services.api}/v1/completions"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
        return int(json.load(answer)["usage"]["completion_tokens"])


def test_endless_tries_at_a_door_that_slams_stop_no_other_link(
    services: Services, doors: dict[str, dict[str, SlammingDoor]]
) -> None:
    """The doors open when both services are at work with the scheduler, and wait for nobody else."""
    for own in doors.values():
        for door in own.values():
            door.open()
    for service, own in doors.items():
        for link, door in own.items():
            assert door.slammed_often.wait(PATIENCE_SECONDS), f"the {service} is stuck at its {link} link"
    assert complete(services) == 5
