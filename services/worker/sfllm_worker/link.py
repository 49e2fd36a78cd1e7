"""The worker's sockets: messages from and to its scheduler, and the files that gateways need.

Of several schedulers the worker belongs to one. The others are only asked whether they are there: a beat
without a lease, which a scheduler answers with its epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import structlog
import zmq

from sfllm import wire
from sfllm.asset_pull import asset_of, chunk_of
from sfllm.link_keys import ClientKeys
from sfllm.messages import (
    ASSETS,
    NO_LEASE,
    SCHEDULER_TO_WORKER,
    AssetGet,
    AssetOffer,
    Message,
    WorkerBeat,
    WorkerBye,
    WorkerHello,
    WorkerUnknown,
    WorkerWelcome,
)
from sfllm.sockets import DealerLink
from sfllm.wire import Array, Decoded, VersionError, WireError, as_array

_log = structlog.get_logger()

MAX_MESSAGES_A_TURN = 256
"""Between two steps at most so many are read, so that a flood cannot stop the model."""

REFUSAL_LOG_SECONDS = 10.0
NEWS_SECONDS = 0.5

LAST_WORDS_SECONDS = 1.0
"""How long `close` waits for the scheduler to take what is left to say."""


_POLLIN = int(zmq.POLLIN)  # pyzmq's enumeration makes a poll several times slower


class Answer(NamedTuple):
    """A scheduler is there: its position among the addresses, and the epoch of its process."""

    scheduler: int
    epoch: int


class SchedulerLink:
    """Owner of all sockets until `close`. Not safe for two threads at once: see `beats.py`.

    Each scheduler has an address in both lists, at the same position. `current` is the position of the one
    that messages go to and come from; `has_others` says whether there is any other.
    """

    def __init__(
        self,
        worker_addresses: Sequence[str],
        asset_addresses: Sequence[str],
        identity: bytes,
        assets: Mapping[str, bytes],
        keys: ClientKeys | None = None,
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._addresses, self._identity = tuple(worker_addresses), identity
        self.has_others = len(worker_addresses) > 1
        self._dealers = [
            DealerLink(self._context, address, identity, watched=True, keys=keys)
            for address in worker_addresses
        ]
        self._asset_dealers = [
            DealerLink(self._context, address, identity, keys=keys) for address in asset_addresses
        ]
        self._keys = keys
        self._has_hello: DealerLink | None = None
        self._next_refusal_log = self._next_news = 0.0
        self._probe = wire.encode(WorkerBeat(NO_LEASE, 0, 0, 0, 0), as_array("Q", ()))
        self._answers: list[Answer] = []
        self.current = 0
        self._other_versions = [""] * len(worker_addresses)
        self._offer = AssetOffer(tuple(asset_of(name, content) for name, content in sorted(assets.items())))
        self._assets = {asset_of(name, content).sha256: content for name, content in assets.items()}
        self._decode = wire.decoder(SCHEDULER_TO_WORKER)
        self._decode_asset = wire.decoder(ASSETS)
        self._poller = zmq.Poller()
        for dealer in [*self._dealers, *self._asset_dealers]:
            self._poller.register(dealer.socket, _POLLIN)

    def wait(self, seconds: float) -> None:
        """Sleep until a message comes, at most `seconds`."""
        self._poller.poll(math.ceil(max(0.0, seconds) * 1000))

    def receive(self) -> list[Decoded]:
        """Messages that came since the last call; questions for assets are answered here."""
        messages: list[Decoded] = []
        if not self._poller.poll(0):  # as between most steps: one look at all sockets is the cheapest
            for dealer in (*self._dealers, *self._asset_dealers):
                dealer.flush()
            return messages
        for index, dealer in enumerate(self._dealers):
            found = self._receive_from(index)
            if index == self.current:
                messages = found
            for message, _arrays in found if index != self.current else ():
                self._take_from_other(index, dealer, message)
            dealer.flush()
        if any(isinstance(message, WorkerWelcome) for message, _arrays in messages):
            self._asset_dealers[self.current].send(wire.encode(self._offer))
        for asset_dealer in self._asset_dealers:
            self._serve_assets(asset_dealer)
        return messages

    @property
    def other_version(self) -> str:
        """Why the current scheduler cannot be understood, if it speaks another version of the protocol."""
        return self._other_versions[self.current]

    def take_answers(self) -> list[Answer]:
        """The other schedulers that have said since the last call that they are there."""
        answers, self._answers = self._answers, []
        return answers

    def probe(self, index: int) -> None:
        """Ask another scheduler whether it is there."""
        self._dealers[index].clear()  # of questions that it has not taken the last is enough
        self._dealers[index].send(self._probe)

    def seconds_lost(self, now: float) -> float:
        """How long the connection to the current scheduler has been lost, as `DealerLink.seconds_lost`."""
        return [dealer.seconds_lost(now) for dealer in self._dealers][self.current]

    def explain(self, now: float) -> None:
        """Say why the scheduler does not let this worker in, if it was refused, and now and then again.

        To be called often; it looks once in `NEWS_SECONDS`, which every link needs (`DealerLink.refusal`).
        """
        if now < self._next_news:
            return
        self._next_news = now + NEWS_SECONDS
        refusals = [dealer.refusal(now) for dealer in (*self._dealers, *self._asset_dealers)]
        if not refusals[self.current] or now < self._next_refusal_log:
            return
        self._next_refusal_log = now + REFUSAL_LOG_SECONDS
        address = self._addresses[self.current]
        _log.warning("refused by the scheduler", address=address, reason=refusals[self.current])

    def turn_to(self, index: int, parted: bool) -> None:
        """Talk to that scheduler from now on. `parted`: the one before has been told goodbye.

        Otherwise it must not hear, when it comes back, what was said to it meanwhile: the hellos above all.
        """
        if not parted:
            self._poller.unregister(self._dealers[self.current].socket)
            self._dealers[self.current].close(linger_milliseconds=0)
            address = self._addresses[self.current]
            dealer = DealerLink(self._context, address, self._identity, watched=True, keys=self._keys)
            self._dealers[self.current] = dealer
            self._poller.register(dealer.socket, _POLLIN)
        self.current = index

    def send(self, message: Message, arrays: tuple[Array, ...] = ()) -> None:
        """Send now or, when the scheduler is slow, later. Raises `OutboxFullError` when it takes nothing."""
        if not (isinstance(message, WorkerHello) and self._hello_waits()):
            self._dealers[self.current].send(wire.encode(message, *arrays))

    def _hello_waits(self) -> bool:
        """Whether an earlier hello still waits for a connection; if not, the one that is sent now may.

        All hellos of a long cut would come at once when it ends, and the worker would join with each.
        """
        dealer = self._dealers[self.current]
        dealer.seconds_lost(time.monotonic())  # or `is_up` would be old
        waits = self._has_hello is dealer and not dealer.is_up
        self._has_hello = None if dealer.is_up else dealer
        return waits

    def clear(self) -> None:
        """Forget what waits: it was for a scheduler that is gone."""
        self._dealers[self.current].clear()

    def _take_from_other(self, index: int, dealer: DealerLink, message: Message) -> None:
        match message:
            case WorkerUnknown():
                self._answers.append(Answer(index, message.epoch))
            case WorkerWelcome():  # to a hello that was given up: it must not count on this worker
                dealer.send(wire.encode(WorkerBye(message.lease)))
            case _:
                pass  # late words under a lease that is gone

    def _receive_from(self, index: int) -> list[Decoded]:
        messages: list[Decoded] = []
        for _ in range(MAX_MESSAGES_A_TURN):
            frame = self._dealers[index].receive()
            if frame is None:
                break
            try:
                messages.append(self._decode(frame))
                self._other_versions[index] = ""
            except VersionError as error:
                self._note_version(index, str(error))
            except WireError as error:
                _log.warning("malformed message from the scheduler", error=str(error))
        return messages

    def _note_version(self, index: int, reason: str) -> None:
        """Log it once, not with every answer to a hello."""
        if reason != self._other_versions[index]:
            _log.error("this scheduler cannot be talked to", scheduler=self._addresses[index], reason=reason)
            self._other_versions[index] = reason  # after the log, where whoever reads /ready may look next

    def _serve_assets(self, dealer: DealerLink) -> None:
        for _ in range(MAX_MESSAGES_A_TURN):
            frame = dealer.receive()
            if frame is None:
                break
            try:
                message = self._decode_asset(frame).message
            except WireError as error:
                _log.warning("malformed message on the asset socket", error=str(error))
                continue
            if isinstance(message, AssetGet):
                content = self._assets.get(message.sha256)
                dealer.send(wire.encode(chunk_of(message.sha256, content, message.offset)))
        dealer.flush()

    def close(self) -> None:
        """Let the last messages leave and close the sockets."""
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        current = self._dealers[self.current]
        while not current.flush() and (left := deadline - time.monotonic()) > 0:
            current.socket.poll(math.ceil(left * 1000), zmq.POLLOUT)
        for dealer in [*self._dealers, *self._asset_dealers]:
            dealer.close()
        self._context.term()
