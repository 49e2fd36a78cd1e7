"""What honest gateways and workers believe, for tests that play both against the core."""

from __future__ import annotations

from core_driver import card

from sfllm.holdings import OpenChoice
from sfllm.messages import (
    ALL_CHOICES,
    Capacity,
    GatewayHeld,
    GrantedRequest,
    Submit,
    WorkerCancel,
    WorkerHeld,
    WorkerHello,
)
from sfllm.wire import Array, as_array

SLOTS = 4
KV_TOKENS = 600


class FakeWorker:
    """Its lease and the choices that it still has to finish, by gateway, handle and attempt."""

    def __init__(self, peer: bytes) -> None:
        self.peer = peer
        self.lease = 0
        self.held: dict[tuple[bytes, int, int], tuple[GrantedRequest, set[int]]] = {}
        self.grants = 0
        self.draining = False

    @property
    def hello(self) -> WorkerHello:
        """How it joins."""
        return WorkerHello(self.peer.decode(), card(max_model_len=500), Capacity(SLOTS, KV_TOKENS, 256))

    def take(self, entry: GrantedRequest) -> None:
        """Hold a granted request."""
        self.held[entry.gateway, entry.handle, entry.attempt] = (entry, set(entry.choices))

    def finish(self, key: tuple[bytes, int, int], choice: int) -> None:
        """One choice of it has ended."""
        _, open_choices = self.held[key]
        open_choices.discard(choice)
        if not open_choices:
            del self.held[key]

    def let_go(self, cancel: WorkerCancel) -> None:
        """Free what is cancelled, and say nothing."""
        for key, (_, open_choices) in list(self.held.items()):
            gateway, handle, attempt = key
            if (gateway, handle) == (cancel.gateway, cancel.handle) and attempt <= cancel.attempt:
                for choice in list(open_choices):
                    if cancel.choice in (ALL_CHOICES, choice):
                        self.finish(key, choice)

    def open_choices(self) -> list[OpenChoice]:
        """All that it holds."""
        return [OpenChoice(*key, choice) for key, (_, left) in self.held.items() for choice in sorted(left)]

    def list_of(self, number: int) -> tuple[WorkerHeld, tuple[Array, ...]]:
        """The answer to a question for it."""
        held = self.open_choices()
        gateways = tuple(dict.fromkeys(choice.gateway for choice in held))
        rows = [(gateways.index(c.gateway), c.handle, c.attempt, c.choice) for c in held]
        columns = list(zip(*rows, strict=True)) or [()] * 4
        return WorkerHeld(self.lease, number, gateways), tuple(map(as_array, "IQII", columns))


class FakeRequest:
    """One request of a gateway. `over` says that this attempt has ended, `ended` that no other will follow.

    `waits` and `passed_by` are what really is the case, whatever the gateway has heard.
    """

    def __init__(self, submit: Submit, tokens: int) -> None:
        self.submit = submit
        self.tokens = tokens
        self.over = False
        self.ended = False
        self.finished: set[int] = set()
        self.cancelled: set[int] = set()
        self.waits = False
        self.passed_by = 0

    @property
    def is_suspect(self) -> bool:
        """Whether other rules than the usual ones say when it runs."""
        return self.submit.suspects > 0

    @property
    def left(self) -> list[int]:
        """Choices that are open as far as the gateway knows."""
        if self.over or self.ended:
            return []
        return sorted(set(self.submit.choices) - self.finished - self.cancelled)


class FakeGateway:
    """Its requests by handle."""

    def __init__(self, peer: bytes) -> None:
        self.peer = peer
        self.requests: dict[int, FakeRequest] = {}

    def open_choices(self) -> list[OpenChoice]:
        """All that it waits for."""
        return [
            OpenChoice(self.peer, handle, request.submit.attempt, choice)
            for handle, request in self.requests.items()
            for choice in request.left
        ]

    def list_of(self, number: int) -> tuple[GatewayHeld, tuple[Array, ...]]:
        """The answer to a question for it."""
        rows = [(c.handle, c.attempt, c.choice) for c in self.open_choices()]
        columns = list(zip(*rows, strict=True)) or [()] * 3
        return GatewayHeld(number), tuple(map(as_array, "QII", columns))
