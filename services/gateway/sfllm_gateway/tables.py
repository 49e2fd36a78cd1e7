"""The streams of one gateway at all of its schedulers: a table for each, and the choice between them. Pure.

A stream is in one table at a time. It moves, by its next attempt, when its scheduler is lost, or has no
worker of its model any more and nothing of the present attempt has come, and another one could serve it.
While no other could, it stays where it is and goes on when its scheduler is back.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from sfllm import wire
from sfllm.messages import Asset, Interrupted, Message, Models, ModelState
from sfllm.rendezvous import Candidate, choose
from sfllm_gateway.model_merge import ModelMerge
from sfllm_gateway.schedulers import routing_key
from sfllm_gateway.stream import Outgoing, Request
from sfllm_gateway.streams import ClearOutbox, OpenStream, StreamTable, unreachable

Note = Callable[[str, dict[str, object]], None]


class SchedulerTables:
    """The streams of the gateway `identity`, whose process start is `epoch`, at schedulers by address.

    Schedulers are named by their position in `addresses`. `on_models` hears the merged list of models. A
    stream's handle is its own among all tables.
    """

    def __init__(
        self,
        identity: bytes,
        epoch: int,
        addresses: Sequence[str],
        max_attempts: int,
        on_models: Callable[[Sequence[ModelState]], None],
        note: Note = lambda _event, _fields: None,
    ) -> None:
        self._addresses = tuple(addresses)
        self._on_models = on_models
        self._models = ModelMerge(len(addresses), note)
        handles = itertools.count(1)
        self._tables = [
            StreamTable(
                identity,
                epoch,
                max_attempts,
                partial(self._take_models, index),
                partial(_note_of, note, address),
                handles,
            )
            for index, address in enumerate(addresses)
        ]
        self._was_connected = [False] * len(addresses)
        self._places: dict[int, int] = {}
        self._open: list[Counter[str]] = [Counter() for _ in addresses]

    @property
    def connected(self) -> int:
        """How many schedulers answer."""
        return sum(table.connected for table in self._tables)

    def holders(self, asset: Asset) -> list[int]:
        """The schedulers that have an asset, as far as is known."""
        return self._models.holders(asset)

    # requests

    def open(self, request: Request, deadline: float, now: float, wake: Callable[[], None]) -> OpenStream:
        """Submit a request that must end by `deadline`. Raises 503 without any scheduler."""
        index = self._choose_any(request)
        if index is None:
            raise unreachable()
        opened = self._tables[index].open(request, deadline, now, wake)
        self._put(opened, index)
        return opened

    def stop_choice(self, opened: OpenStream, choice: int, kept_tokens: int, now: float) -> None:
        """A stop string ended this choice. The stream must not have been released."""
        self._tables[self._places[opened.stream.handle]].stop_choice(opened, choice, kept_tokens, now)

    def release(self, opened: OpenStream, reason: str, now: float) -> None:
        """Forget a stream; one that has not ended is cancelled. Repeated calls do nothing."""
        if opened.stream.handle in self._places:
            self._tables[self._take(opened)].release(opened, reason, now)

    def bye(self) -> None:
        """The gateway leaves."""
        for table in self._tables:
            table.bye()

    # messages and time

    def take_outgoing(self, index: int) -> list[Outgoing | ClearOutbox]:
        """What is to be sent to a scheduler, in order; each is given once."""
        return self._tables[index].take_outgoing()

    def handle(self, index: int, message: Message, arrays: Sequence[wire.Array], now: float) -> None:
        """Take a message of a scheduler. Raises `WireError` for one that makes no sense."""
        table = self._tables[index]
        table.handle(message, arrays, now)
        if table.connected is not self._was_connected[index] or isinstance(message, Models):
            self._settle(now)
        elif isinstance(message, Interrupted):
            opened = table.find(message.handle)
            if opened is not None:
                self._move_if_stranded(index, opened, now)

    def tick(self, now: float) -> None:
        """Do what time brings, as `StreamTable.tick`."""
        for table in self._tables:
            table.tick(now)
        self._settle_changes(now)

    def lose_connection(self, index: int, now: float) -> None:
        """The connection to a scheduler is lost: it is given up, unless it is the only one."""
        if self._tables[index].connected and self.connected > 1:
            self.lose(index, "the connection was lost", now)

    def lose(self, index: int, reason: str, now: float) -> None:
        """Give a scheduler up."""
        self._tables[index].lose(reason)
        self._settle_changes(now)

    # where streams are

    def _choose_any(self, request: Request) -> int | None:
        """A scheduler for a new request: one that serves its model or, without any, one that answers.

        Of these one that knows the model, or it would say that there is none.
        """
        index = self._choose(request)
        if index is None and self.connected:
            answering = [index for index, table in enumerate(self._tables) if table.connected]
            knowing = [index for index in answering if self._models.lists(index, request.model)]
            index = self._choose_of(knowing or answering, request)
        return index

    def _choose(self, request: Request) -> int | None:
        """The scheduler for a request among those that serve its model, None without any."""
        serving = [
            index
            for index, table in enumerate(self._tables)
            if table.connected and self._models.workers(index, request.model)
        ]
        return self._choose_of(serving, request) if serving else None

    def _choose_of(self, indices: Sequence[int], request: Request) -> int:
        candidates = [
            Candidate(
                self._addresses[index],
                max(1, self._models.workers(index, request.model)),
                self._open[index][request.model],
            )
            for index in indices
        ]
        return indices[choose(routing_key(request), candidates) if len(indices) > 1 else 0]

    def _put(self, opened: OpenStream, index: int) -> None:
        self._places[opened.stream.handle] = index
        self._open[index][opened.stream.request.model] += 1

    def _take(self, opened: OpenStream) -> int:
        """Where it was."""
        index = self._places.pop(opened.stream.handle)
        counts, model = self._open[index], opened.stream.request.model
        counts[model] -= 1
        if not counts[model]:
            del counts[model]
        return index

    def _take_models(self, index: int, states: Sequence[ModelState]) -> None:
        if self._tables[index].connected:  # otherwise it is late news of a scheduler that is lost
            self._models.set(index, states)
            self._on_models(self._models.merged)

    def _settle_changes(self, now: float) -> None:
        if any(
            table.connected is not was for table, was in zip(self._tables, self._was_connected, strict=True)
        ):
            self._settle(now)

    def _settle(self, now: float) -> None:
        """After a scheduler came, went, or told of other models: move what is better off elsewhere."""
        for index, table in enumerate(self._tables):
            if self._was_connected[index] and not table.connected:
                self._forget_models(index)
            self._was_connected[index] = table.connected
        if len(self._tables) == 1:
            return
        for index, table in enumerate(self._tables):
            for opened in table.streams():
                self._move_if_stranded(index, opened, now)

    def _forget_models(self, index: int) -> None:
        """A lost scheduler serves nothing. What the last one served is known until another says more."""
        if self._models.set(index, ()) and self.connected:
            self._on_models(self._models.merged)

    def _move_if_stranded(self, index: int, opened: OpenStream, now: float) -> None:
        stream = opened.stream
        if stream.ended:
            return
        if self._tables[index].connected and (
            self._models.workers(index, stream.request.model) or stream.attempt_has_output
        ):
            return
        target = self._choose(stream.request)
        if target is None or target == index:
            return
        self._tables[self._take(opened)].release(opened, "moved", now)
        self._put(opened, target)
        self._tables[target].adopt(opened, now)


def _note_of(note: Note, address: str, event: str, fields: dict[str, object]) -> None:
    note(event, {"scheduler": address, **fields})
