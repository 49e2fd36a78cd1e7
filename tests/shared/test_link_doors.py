"""Which keys open which of the scheduler's doors, on real sockets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import zmq

from sfllm.link_auth import LinkAuthenticator
from sfllm.link_keys import ClientKeys, ClientRole, add_link_key, key_file, make_link_keys, read_client_keys
from sfllm.sockets import DealerLink, RouterLink, random_identity

PATIENCE_SECONDS = 30.0
T = TypeVar("T")
DOORS = ("gateway", "worker", "asset")


class House:
    """The scheduler's three doors, and guests that knock."""

    def __init__(self, keys: Path) -> None:
        self.keys = keys
        make_link_keys(keys)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._guests: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._keeper = LinkAuthenticator(self._context, str(key_file(keys, "scheduler")))
        self.doors = {
            door: RouterLink(self._context, "tcp://127.0.0.1:*", self._keeper.secret, door) for door in DOORS
        }
        self._links: list[DealerLink] = []

    def knock(self, door: str, keys: ClientKeys | None) -> DealerLink:
        link = DealerLink(self._guests, self.doors[door].address, random_identity(b"t-"), keys=keys)
        self._links.append(link)
        link.send(b"let me in")
        return link

    def close(self) -> None:
        for link in self._links:
            link.close(linger_milliseconds=0)
        for door in self.doors.values():
            door.close()
        self._keeper.close()
        self._guests.term()
        self._context.term()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.close()


def wait_for(ask: Callable[[], T]) -> T:
    """What `ask` gives as soon as it is something."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (answer := ask()):
        assert time.monotonic() < deadline, "it never comes"
        time.sleep(0.005)
    return answer


@pytest.mark.parametrize(
    ("role", "door", "open_to_it"),
    [
        ("gateway", "gateway", True),
        ("gateway", "asset", True),
        ("gateway", "worker", False),
        ("worker", "worker", True),
        ("worker", "asset", True),
        ("worker", "gateway", False),
    ],
)
def test_a_role_s_key_opens_its_own_doors_alone(
    house: House, role: ClientRole, door: str, open_to_it: bool
) -> None:
    guest = house.knock(door, read_client_keys(key_file(house.keys, role), role))
    if open_to_it:
        assert wait_for(house.doors[door].receive)[1] == b"let me in"
        assert house.doors[door].take_refused() == 0
    else:
        assert "does not know" in wait_for(lambda: guest.refusal(time.monotonic()))
        assert wait_for(house.doors[door].take_refused) >= 1
        assert house.doors[door].receive() is None


@pytest.mark.parametrize("door", DOORS)
def test_a_guest_without_keys_or_with_the_wrong_scheduler_s_stays_outside(
    house: House, door: str, tmp_path: Path
) -> None:
    make_link_keys(tmp_path / "other")
    role: ClientRole = "gateway" if door == "gateway" else "worker"
    own = read_client_keys(key_file(house.keys, role), role)
    other = read_client_keys(key_file(tmp_path / "other", role), role)
    for keys, reason in ((None, "wants keys"), (own._replace(scheduler=other.scheduler), "another key")):
        guest = house.knock(door, keys)
        assert reason in wait_for(lambda guest=guest: guest.refusal(time.monotonic()))
        assert wait_for(house.doors[door].take_refused) >= 1
    assert house.doors[door].receive() is None


def test_a_key_that_is_added_opens_the_door_without_a_new_keeper(house: House) -> None:
    add_link_key(house.keys, "worker", "late")
    house.knock("worker", read_client_keys(key_file(house.keys, "worker-late"), "worker"))
    assert wait_for(house.doors["worker"].receive)[1] == b"let me in"
