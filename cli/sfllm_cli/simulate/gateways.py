"""The gateways and their clients: submissions, further attempts, and the times of every request."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from sfllm.messages import (
    ALL_CHOICES,
    Cancel,
    Finished,
    GatewayBeat,
    GatewayHello,
    GatewayWelcome,
    Interrupted,
    Message,
    Models,
    Rejected,
    Sampling,
    Submit,
)
from sfllm.wire import Array, as_array
from sfllm_cli.simulate.agenda import Agenda
from sfllm_cli.simulate.placing import Placing
from sfllm_cli.simulate.schedulers import Schedulers
from sfllm_cli.simulate.worker import CARD
from sfllm_cli.simulate.workload import Asked
from sfllm_scheduler.core.events import FromGateway

EPOCH = 1
"""Of the gateways' processes, which never end."""

MAX_PROMPT_TOKENS = 2**20
SAMPLING_SEED = 1

_NOTHING = as_array("I", ())
_ZEROS = memoryview(array("I", bytes(4 * MAX_PROMPT_TOKENS)))


class Ask:
    """One request and what came of it. Times are absolute; 0 means not yet.

    `place` is the number of the scheduler that has it, `has_output` whether a token of the present attempt
    has come.
    """

    __slots__ = (
        "asked",
        "attempt",
        "crashes_alone",
        "ended",
        "error",
        "first",
        "handle",
        "has_output",
        "last_worker",
        "missing",
        "place",
        "suspects",
    )

    def __init__(self, asked: Asked, handle: int) -> None:
        self.asked = asked
        self.handle = handle
        self.place = 0
        self.attempt = 0
        self.has_output = False
        self.missing = asked.output_tokens
        self.first = 0.0
        self.ended = 0.0
        self.error = ""
        self.last_worker = ""
        self.suspects = self.crashes_alone = 0


class Gateways:
    """All requests that are open, by gateway and handle, and where they go when they have ended.

    `on_move` hears of a request that is about to leave its scheduler for another. `max_tokens` is what
    clients allow an answer to have; None if they know its length beforehand.
    """

    def __init__(
        self,
        agenda: Agenda,
        count: int,
        schedulers: Schedulers,
        max_tokens: int | None,
        on_end: Callable[[Ask], None],
        on_move: Callable[[Ask], None],
    ) -> None:
        self.open: list[dict[int, Ask]] = [{} for _ in range(count)]
        self.interrupted = 0
        self._agenda = agenda
        self._schedulers = schedulers
        self._link_seconds = schedulers.link_seconds
        self._placing = Placing(count, schedulers.addresses)
        self._max_tokens = max_tokens
        self._on_end = on_end
        self._on_move = on_move
        self._handle = 0

    @property
    def known(self) -> list[int]:
        """The schedulers that they know to be there."""
        return self._placing.known

    @property
    def loads(self) -> list[list[int]]:
        """Open requests by gateway and scheduler."""
        return self._placing.loads

    def hello(self, scheduler: int) -> None:
        """Say hello to a scheduler."""
        for gateway in range(len(self.open)):
            self._post(scheduler, gateway, GatewayHello(EPOCH))

    def beat(self) -> None:
        """What keeps them known. They hold what the scheduler thinks: nothing is lost on these links."""
        for scheduler in range(len(self._schedulers.addresses)):
            for gateway in range(len(self.open)):
                digest = self._schedulers.digest_of_gateway(scheduler, b"%d" % gateway)
                self._post(scheduler, gateway, GatewayBeat(EPOCH, digest))

    def lose(self, scheduler: int) -> None:
        """A scheduler is gone: what it had goes on at others."""
        self._placing.lose(scheduler)
        self._settle()

    def ask(self, asked: Asked) -> None:
        """A client asks."""
        self._handle += 1
        ask = Ask(asked, self._handle)
        gateway = self._gateway_of(ask)
        self.open[gateway][self._handle] = ask
        ask.place = self._placing.choose_any(gateway, asked.prompt_names, str(ask.handle))
        self._placing.put(gateway, ask.place)
        self._submit(ask)

    def receive(self, scheduler: int, peer: bytes, message: Message) -> None:
        """A message of a scheduler."""
        match message:
            case Finished():
                self._end(int(peer), message.handle, message.attempt, "")
            case Rejected():
                self._end(int(peer), message.handle, message.attempt, message.code)
            case Interrupted():
                ask = self.open[int(peer)].get(message.handle)
                if ask is not None and ask.attempt == message.attempt:
                    ask.last_worker = message.worker or ask.last_worker
                    ask.suspects = message.suspects
                    ask.crashes_alone += message.suspects == 1
                    self._begin_attempt(ask)
                    self._agenda.after(self._link_seconds, self._submit_again, ask, ask.attempt)
            case Models():
                workers = [each.workers for each in message.models if each.card.name == CARD.name]
                if self._placing.hear(scheduler, workers[0] if workers else None):
                    self._settle()
            case GatewayWelcome() if scheduler not in self._placing.known:
                self._find(scheduler)

    def first_token(self, gateway: int, handle: int, now: float) -> None:
        """A token was chosen; it reaches the client by two links."""
        ask = self.open[gateway].get(handle)
        if ask is not None:
            ask.has_output = True
            ask.first = ask.first or now + 2 * self._link_seconds

    def tokens_of(self, gateway: int, handle: int) -> int:
        """How long its answer is."""
        ask = self.open[gateway].get(handle)
        return ask.asked.output_tokens if ask is not None else 1

    def names_of(self, gateway: int, handle: int) -> Sequence[int]:
        """Names of the beginnings of its prompt and answer."""
        ask = self.open[gateway].get(handle)
        return ask.asked.names if ask is not None else ()

    def lost(self, gateway: int, handle: int, attempt: int, left: int) -> None:
        """Of this attempt so many tokens have not come, and will not."""
        ask = self.open[gateway].get(handle)
        if ask is not None and ask.attempt == attempt:
            ask.missing = left

    def _find(self, scheduler: int) -> None:
        """A scheduler is back, and knows nothing: what found no other place is submitted to it again."""
        self._placing.find(scheduler)
        for asks in self.open:
            for ask in asks.values():
                if ask.place == scheduler:
                    self._begin_attempt(ask)
                    self._submit(ask)

    def _settle(self) -> None:
        """A scheduler went, or has other workers: move what is better off elsewhere."""
        if self._placing.has_choice:
            for asks in self.open:
                for ask in asks.values():
                    self._move_if_stranded(ask)

    def _move_if_stranded(self, ask: Ask) -> bool:
        """Begin the next attempt elsewhere if nothing can come of this one here. Whether it did."""
        placing, gateway = self._placing, self._gateway_of(ask)
        is_known = ask.place in placing.known
        if placing.serves(ask.place) or (is_known and ask.has_output):
            return False
        target = placing.choose(gateway, ask.asked.prompt_names, str(ask.handle))
        if target is None or target == ask.place:
            return False
        if is_known:
            self._post(ask.place, gateway, Cancel(ask.handle, ask.attempt, ALL_CHOICES, "moved"))
        self._on_move(ask)
        self._begin_attempt(ask)
        placing.take(gateway, ask.place)
        placing.put(gateway, target)
        ask.place = target
        self._submit(ask)
        return True

    def _begin_attempt(self, ask: Ask) -> None:
        ask.attempt += 1
        ask.has_output = False
        self.interrupted += 1

    def _submit_again(self, ask: Ask, attempt: int) -> None:
        if ask.attempt == attempt and not ask.ended and not self._move_if_stranded(ask):
            self._submit(ask)

    def _submit(self, ask: Ask) -> None:
        asked, now = ask.asked, self._agenda.now
        so_far = asked.output_tokens - ask.missing
        limit = max(self._max_tokens or 0, asked.output_tokens)
        message = Submit(
            request_id=str(ask.handle),
            handle=ask.handle,
            attempt=ask.attempt,
            model=CARD.name,
            choices=(0,),
            generated_counts=(so_far,),
            sampling=Sampling(limit, SAMPLING_SEED, ignore_eos=True),
            priority=0,
            milliseconds_left=max(1, int((asked.at + asked.deadline - now) * 1000)),
            last_worker=ask.last_worker,
            age_milliseconds=int((now - asked.at) * 1000),
            suspects=ask.suspects,
            crashes_alone=ask.crashes_alone,
            tenant=asked.tenant,
        )
        arrays = (_ZEROS[: asked.prompt_tokens], _ZEROS[:so_far] if so_far else _NOTHING, asked.prompt_names)
        self._post(ask.place, self._gateway_of(ask), message, arrays)

    def _post(self, scheduler: int, gateway: int, message: Message, arrays: tuple[Array, ...] = ()) -> None:
        self._schedulers.post(scheduler, FromGateway(b"%d" % gateway, message, arrays))

    def _gateway_of(self, ask: Ask) -> int:
        return ask.handle % len(self.open)

    def _end(self, gateway: int, handle: int, attempt: int, error: str) -> None:
        ask = self.open[gateway].get(handle)
        if ask is None or ask.attempt != attempt:
            return
        del self.open[gateway][handle]
        self._placing.take(gateway, ask.place)
        ask.ended = self._agenda.now + self._link_seconds
        ask.error = error
        self._on_end(ask)
