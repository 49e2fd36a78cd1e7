"""A gateway's process: its table of streams, and a client for each request that looks at every token."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import partial

from sfllm import wire
from sfllm.errors import ErrorCode, ServiceError
from sfllm.messages import PROBATION_TOKENS, SCHEDULER_TO_GATEWAY, Interrupted, Message, ModelState
from sfllm_gateway.stream import Request
from sfllm_gateway.streams import ClearOutbox, OpenStream, StreamTable

from .agenda import Agenda
from .model import LEASE_SECONDS, MODEL, Truth
from .network import Link
from .process import Process, encoded, require
from .script import Open

TICK_SECONDS = 0.1
DEADLINE_GRACE_SECONDS = 2.0
"""A client hears of a deadline from the scheduler, or from its gateway a little later."""

MakeTable = Callable[[bytes, int, int, Callable[[Sequence[ModelState]], None]], StreamTable]

_decode = wire.decoder(SCHEDULER_TO_GATEWAY)


class Client:
    """Who asked for something, and what it has seen. Every journal must be a prefix of the true tokens.

    `ended_at` is the second at which the answer ended, and `outcome` how: "finished", an error code, "left"
    (it hung up) or "cut off" (its gateway died).
    """

    def __init__(self, agenda: Agenda, asked: Open, token_stops: dict[int, int]) -> None:
        self.agenda = agenda
        self.asked = asked
        self.token_stops = token_stops
        self.truth = Truth(asked)
        self.opened: OpenStream | None = None
        self.opened_at: float | None = None
        self.identity = b""
        self.outcome: str | None = None
        self.error: ServiceError | None = None
        self.ended_at = 0.0
        self.attempts = 0
        self._losses: list[tuple[int, list[int]]] = []
        self._seen = [0] * asked.n
        self._reasons: list[str | None] = [None] * asked.n

    @property
    def tokens(self) -> int:
        """How many tokens it has got."""
        return sum(self._seen)

    @property
    def name(self) -> str:
        """How reports call it."""
        return f"request {self.asked.request}"

    def request(self) -> Request:
        """What it asks for."""
        asked = self.asked
        prompt = array("I", self.truth.prompt)
        return Request(
            f"r{asked.request}",
            MODEL,
            prompt,
            asked.n,
            self.truth.sampling,
            asked.priority,
            tenant=asked.tenant,
        )

    def end(self, outcome: str, error: ServiceError | None = None) -> None:
        """Nothing more comes."""
        require(self.outcome is None, "ends once", f"{self.name} ended as {self.outcome}, then as {outcome}")
        self.outcome, self.error, self.ended_at = outcome, error, self.agenda.now

    def note_loss(self, message: Interrupted) -> None:
        """If this says that it was alone on a lost worker, remember how far it had come."""
        stream = self.opened.stream if self.opened is not None else None
        if stream is None or (message.handle, message.attempt) != (stream.handle, stream.attempt):
            return
        if message.suspects == 1:
            self._losses.append((stream.attempt, [len(choice.ids) for choice in stream.choices]))

    @property
    def seems_poisonous(self) -> bool:
        """Whether it was alone at two losses of workers, without an attempt that came further in between."""
        if len(self._losses) < 2:
            return False
        (first, before), (last, after) = self._losses[-2:]
        grown = max(new - old for old, new in zip(before, after, strict=True))
        return grown < PROBATION_TOKENS * (last - first)

    def check(self) -> None:
        """Compare what is new in the journals with the truth."""
        if self.opened is None:
            return
        stream = self.opened.stream
        self.attempts = stream.attempt
        for index, journal in enumerate(stream.choices):
            truth, seen, ids = self.truth.choices[index], self._seen[index], journal.ids
            which = f"choice {index} of {self.name}"
            require(len(ids) >= seen, "keeps tokens", f"{which} has {len(ids)} tokens after {seen}")
            fresh = list(ids[seen:])
            expected = truth.tokens[seen : len(ids)]
            if fresh != expected:
                require(False, "true tokens", f"{which} goes on at {seen} with {fresh} instead of {expected}")
            if self.asked.logprobs >= 0:
                wanted = [id_ for at in range(seen, len(ids)) for id_ in self.truth.logprobs(index, at).ids]
                found = list(journal.logprobs.part(seen, len(ids)).ids)
                require(found == wanted, "log probabilities", f"{which} has others than it should at {seen}")
            self._seen[index] = len(ids)
            self._check_end(which, index, journal.finish_reason)

    def _check_end(self, which: str, index: int, reason: str | None) -> None:
        before = self._reasons[index]
        require(before is None or reason == before, "ends once", f"{which} ended by {before}, then {reason}")
        self._reasons[index] = reason
        stop = self.token_stops.get(index)
        if reason is None or (stop is not None and self._seen[index] >= stop):
            return
        truth = self.truth.choices[index]
        complete = self._seen[index] == len(truth.tokens) and reason == truth.reason
        require(
            complete,
            "whole answers",
            f"{which} ended by {reason} with {self._seen[index]} of {len(truth.tokens)} tokens",
        )

    def stops_to_make(self) -> list[tuple[int, int]]:
        """Choices that have reached the client's stop, and how many of their tokens are kept."""
        if self.opened is None:
            return []
        return [
            (choice, kept)
            for choice, kept in self.token_stops.items()
            if self._reasons[choice] is None and self._seen[choice] >= kept
        ]

    def note_stopped(self, choice: int, kept: int) -> None:
        """The gateway cut the choice here."""
        self._seen[choice], self._reasons[choice] = kept, "stop"


class Gateway(Process):
    """One run of a gateway. `leaving`: it takes no new requests and goes when the last has ended."""

    def __init__(
        self,
        agenda: Agenda,
        name: str,
        clock_offset: float,
        identity: bytes,
        epoch: int,
        make_table: MakeTable,
        max_attempts: int,
    ) -> None:
        super().__init__(agenda, name, clock_offset)
        self.identity = identity
        self.models: Sequence[ModelState] = ()
        self.table = make_table(identity, epoch, max_attempts, self._on_models)
        self.clients: list[Client] = []
        self.leaving = False
        self.on_left: Callable[[], None] = lambda: None
        self._link: Link | None = None
        self._woken: list[Client] = []
        self._heard_at = 0.0

    def start(self, link: Link) -> None:
        """Connect."""
        self._link = link
        self.every(TICK_SECONDS, self._tick)

    def receive(self, frame: bytes) -> None:
        """A message arrived."""
        message, arrays = _decode(frame)
        self.do(lambda: self._handle(message, arrays))

    def _handle(self, message: Message, arrays: tuple[wire.Array, ...]) -> None:
        self._heard_at = self.clock
        if isinstance(message, Interrupted):
            for client in self.clients:
                client.note_loss(message)
        self.table.handle(message, arrays, self.clock)

    def ask(self, client: Client) -> None:
        """A client asks, unless it has done so; without a model to ask it does nothing and comes again."""
        serves = any(state.card.name == MODEL and state.workers for state in self.models)
        ready = serves and self.table.connected and not self.leaving
        if not ready or client.opened is not None or client.outcome is not None:
            return
        deadline = self.clock + client.asked.deadline
        wake = partial(self._woken.append, client)
        try:
            client.opened = self.table.open(client.request(), deadline, self.clock, wake)
        except ServiceError as error:
            require(error.code == ErrorCode.SERVICE_UNAVAILABLE, "opens", f"{client.name}: {error}")
            return
        client.opened_at = self.agenda.now
        client.identity = self.identity
        self.clients.append(client)

    def drain(self) -> None:
        """SIGTERM."""
        self.leaving = True

    def hang_up(self, client: Client) -> None:
        """A client leaves."""
        if client.outcome is None:
            self._release(client, "left")

    def after_work(self) -> None:
        """Let clients look at what came, and send what came of it."""
        for client in list(self.clients):
            client.check()
            self._stop_choices(client)
        # A wake may come late, or for a stream that has been released since, but none may be missing.
        woken, self._woken[:] = list(self._woken), []
        for client in list(self.clients):
            if client.opened is not None and client.opened.stream.ended:
                require(client in woken, "wakes", f"{client.name} ended, and its client was not told")
                self._release(client, None)
        self._send()
        if self.leaving and not self.clients:
            self._go()

    def _tick(self) -> None:
        self.do(self._tick_now)

    def _tick_now(self) -> None:
        self.table.tick(self.clock)
        silent = self.clock - self._heard_at > LEASE_SECONDS + TICK_SECONDS
        require(
            not (silent and self.table.connected), "leases", f"{self.name} believes in a silent scheduler"
        )
        for client in list(self.clients):
            assert client.opened_at is not None
            late = self.agenda.now - client.opened_at - client.asked.deadline
            if late > DEADLINE_GRACE_SECONDS and not self._ended(client):
                self._release(client, ErrorCode.DEADLINE_EXCEEDED.value)

    @staticmethod
    def _ended(client: Client) -> bool:
        return client.opened is not None and client.opened.stream.ended

    def _stop_choices(self, client: Client) -> None:
        for choice, kept in client.stops_to_make():
            assert client.opened is not None
            self.table.stop_choice(client.opened, choice, kept, self.clock)
            client.note_stopped(choice, kept)
            if client.opened.stream.ended:
                self._woken.append(client)

    def _release(self, client: Client, outcome: str | None) -> None:
        """Forget a client: because it left, or (outcome None) as its stream says."""
        opened = client.opened
        if opened is not None:
            error = opened.stream.error
            if outcome is None:
                client.end("finished" if error is None else error.code.value, error)
            else:
                client.end(outcome)
            self.clients.remove(client)
            self.table.release(opened, outcome or "finished", self.clock)
        else:
            client.end(outcome or "finished")

    def _send(self) -> None:
        assert self._link is not None
        for outgoing in self.table.take_outgoing():
            if isinstance(outgoing, ClearOutbox):
                self._link.outbox.clear()
            else:
                self._link.send(encoded(outgoing.message, outgoing.arrays))

    def _go(self) -> None:
        self.table.bye()
        self._send()
        self.on_left()

    def die(self) -> None:
        """Its clients lose their connections with it."""
        super().die()
        for client in self.clients:
            client.end("cut off")
        self.clients.clear()

    def _on_models(self, models: Sequence[ModelState]) -> None:
        self.models = models
