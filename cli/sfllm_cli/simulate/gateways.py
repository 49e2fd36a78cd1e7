"""The gateways and their clients: submissions, further attempts, and the times of every request."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from sfllm.messages import (
    Finished,
    GatewayBeat,
    GatewayHello,
    Interrupted,
    Message,
    Rejected,
    Sampling,
    Submit,
)
from sfllm.wire import as_array
from sfllm_cli.simulate.agenda import Agenda
from sfllm_cli.simulate.worker import CARD
from sfllm_cli.simulate.workload import Asked
from sfllm_scheduler.core.events import FromGateway

MAX_PROMPT_TOKENS = 2**20
SAMPLING_SEED = 1

_NOTHING = as_array("I", ())
_ZEROS = memoryview(array("I", bytes(4 * MAX_PROMPT_TOKENS)))


class Ask:
    """One request and what came of it. Times are absolute; 0 means not yet."""

    __slots__ = (
        "asked",
        "attempt",
        "crashes_alone",
        "ended",
        "error",
        "first",
        "handle",
        "last_worker",
        "missing",
        "suspects",
    )

    def __init__(self, asked: Asked, handle: int) -> None:
        self.asked = asked
        self.handle = handle
        self.attempt = 0
        self.missing = asked.output_tokens
        self.first = 0.0
        self.ended = 0.0
        self.error = ""
        self.last_worker = ""
        self.suspects = self.crashes_alone = 0


class Gateways:
    """All requests that are open, by gateway and handle, and where they go when they have ended.

    `max_tokens` is what clients allow an answer to have; None if they know its length beforehand.
    """

    def __init__(
        self,
        agenda: Agenda,
        count: int,
        link_seconds: float,
        max_tokens: int | None,
        post: Callable[[FromGateway], None],
        on_end: Callable[[Ask], None],
    ) -> None:
        self.open: list[dict[int, Ask]] = [{} for _ in range(count)]
        self.interrupted = 0
        self._agenda = agenda
        self._link_seconds = link_seconds
        self._max_tokens = max_tokens
        self._post = post
        self._on_end = on_end
        self._handle = 0

    def start(self, epoch: int) -> None:
        """Say hello."""
        for gateway in range(len(self.open)):
            self._post(FromGateway(b"%d" % gateway, GatewayHello(epoch)))

    def beat(self, epoch: int, digest: Callable[[bytes], int]) -> None:
        """What keeps them known. They hold what the scheduler thinks: nothing is lost on these links."""
        for gateway in range(len(self.open)):
            peer = b"%d" % gateway
            self._post(FromGateway(peer, GatewayBeat(epoch, digest(peer))))

    def ask(self, asked: Asked) -> None:
        """A client asks."""
        self._handle += 1
        ask = Ask(asked, self._handle)
        self.open[self._handle % len(self.open)][self._handle] = ask
        self._submit(ask)

    def receive(self, peer: bytes, message: Message) -> None:
        """A message of the scheduler."""
        match message:
            case Finished():
                self._end(int(peer), message.handle, message.attempt, "")
            case Rejected():
                self._end(int(peer), message.handle, message.attempt, message.code)
            case Interrupted():
                ask = self.open[int(peer)].get(message.handle)
                if ask is not None and ask.attempt == message.attempt:
                    ask.attempt += 1
                    ask.last_worker = message.worker or ask.last_worker
                    ask.suspects = message.suspects
                    ask.crashes_alone += message.suspects == 1
                    self.interrupted += 1
                    self._agenda.after(self._link_seconds, self._submit, ask)

    def first_token(self, gateway: int, handle: int, now: float) -> None:
        """A token was chosen; it reaches the client by two links."""
        ask = self.open[gateway].get(handle)
        if ask is not None and not ask.first:
            ask.first = now + 2 * self._link_seconds

    def tokens_of(self, gateway: int, handle: int) -> int:
        """How long its answer is."""
        ask = self.open[gateway].get(handle)
        return ask.asked.output_tokens if ask is not None else 1

    def names_of(self, gateway: int, handle: int) -> Sequence[int]:
        """Names of the beginnings of its prompt and answer."""
        ask = self.open[gateway].get(handle)
        return ask.asked.names if ask is not None else ()

    def lost(self, gateway: int, handle: int, left: int) -> None:
        """Its worker died: so many tokens have not come."""
        ask = self.open[gateway].get(handle)
        if ask is not None:
            ask.missing = left

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
        self._post(FromGateway(b"%d" % (ask.handle % len(self.open)), message, arrays))

    def _end(self, gateway: int, handle: int, attempt: int, error: str) -> None:
        ask = self.open[gateway].get(handle)
        if ask is None or ask.attempt != attempt:
            return
        del self.open[gateway][handle]
        ask.ended = self._agenda.now + self._link_seconds
        ask.error = error
        self._on_end(ask)
