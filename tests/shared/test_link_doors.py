"""Which keys open which of the scheduler's doors, on real sockets."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import zmq

from sfllm.link_auth import LinkAuthenticator
from sfllm.link_keys import ClientKeys, ClientRole, add_link_key, key_file, make_link_keys, read_client_keys
from sfllm.sockets import DealerLink, PeerUnreachableError, RouterLink, random_identity

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
        self.keeper = LinkAuthenticator(self._context, str(key_file(keys, "scheduler")))
        self.doors = {
            door: RouterLink(self._context, "tcp://127.0.0.1:*", self.keeper, door) for door in DOORS
        }
        self._links: list[DealerLink] = []

    def knock(self, door: str, keys: ClientKeys | None, identity: bytes = b"") -> DealerLink:
        identity = identity or random_identity(b"t-")
        link = DealerLink(self._guests, self.doors[door].address, identity, keys=keys)
        self._links.append(link)
        link.send(b"let me in")
        return link

    def close(self) -> None:
        for link in self._links:
            link.close(linger_milliseconds=0)
        for door in self.doors.values():
            door.close()
        self.keeper.close()
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


@pytest.fixture
def two(house: House) -> tuple[DealerLink, DealerLink, list[bytes]]:
    """Two workers inside, of whom the first has a key of its own, `worker-late`; their routing ids."""
    add_link_key(house.keys, "worker", "late")
    links, peers = [], []
    for name in ("worker-late", "worker"):
        links.append(house.knock("worker", read_client_keys(key_file(house.keys, name), "worker")))
        peers.append(wait_for(house.doors["worker"].receive)[0])
    return links[0], links[1], peers


def revoke(house: House) -> str:
    """Take the line of `worker-late` away; the file as it was."""
    file = key_file(house.keys, "scheduler")
    before = file.read_text()
    lines = before.splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith('"worker-late"')))
    house.keeper.look(time.monotonic())
    return before


def test_a_guest_whose_key_is_taken_away_is_neither_heard_nor_told_anything(
    house: House, two: tuple[DealerLink, DealerLink, list[bytes]]
) -> None:
    late, other, peers = two
    door = house.doors["worker"]
    assert door.take_revoked() == []
    late.send(b"not read yet")
    assert wait_for(lambda: door.socket.poll(0))
    revoke(house)
    assert door.take_revoked() == [peers[0]]

    def is_cut_off() -> str:
        """Why; until it speaks, the connection is there, but leads nowhere."""
        late.send(b"too late")
        assert door.receive() is None
        with contextlib.suppress(PeerUnreachableError):
            door.send(peers[0], b"for those inside")
        return late.refusal(time.monotonic())

    assert "does not know" in wait_for(is_cut_off)
    other.send(b"heard")
    assert wait_for(door.receive) == (peers[1], b"heard")
    door.send(peers[1], b"for those inside")
    assert wait_for(other.receive) == b"for those inside"
    assert late.receive() is None
    assert door.receive() is None


def test_a_guest_of_whom_nothing_was_known_is_cut_off_at_the_first_word(
    house: House, two: tuple[DealerLink, DealerLink, list[bytes]]
) -> None:
    late, other, peers = two
    door = house.doors["worker"]
    door.forget(peers[0])  # as if it had connected and never said anything
    revoke(house)
    assert door.take_revoked() == []
    late.send(b"hello")
    other.send(b"hello")
    heard = []

    def cut() -> list[bytes]:
        heard.extend([each for each in [door.receive()] if each is not None])
        return door.take_revoked()

    assert wait_for(cut) == [peers[0]]
    if not heard:
        heard.append(wait_for(door.receive))
    assert heard == [(peers[1], b"hello")]


def test_a_guest_with_another_s_routing_id_goes_by_its_own_key(
    house: House, two: tuple[DealerLink, DealerLink, list[bytes]]
) -> None:
    _, _, peers = two
    door = house.doors["worker"]
    keys = read_client_keys(key_file(house.keys, "worker-late"), "worker")
    house.knock("worker", keys, peers[1])
    assert wait_for(door.receive) == (peers[1], b"let me in")
    revoke(house)
    assert sorted(door.take_revoked()) == sorted(peers)


def test_a_guest_whose_key_is_given_back_comes_in_again_by_itself(
    house: House, two: tuple[DealerLink, DealerLink, list[bytes]]
) -> None:
    late, _, peers = two
    door = house.doors["worker"]
    before = revoke(house)
    assert door.take_revoked() == [peers[0]]

    def says(word: bytes) -> str:
        late.send(word)
        return late.refusal(time.monotonic())  # which tries again when it is time

    assert "does not know" in wait_for(lambda: says(b"nobody hears it"))
    assert door.receive() is None
    key_file(house.keys, "scheduler").write_text(before)
    assert wait_for(lambda: (says(b"back"), door.receive())[1] == (peers[0], b"back"))
    assert door.take_revoked() == []
