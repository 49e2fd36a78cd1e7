"""A worker's protocol around an engine, driven by a test with a clock of its own."""

from __future__ import annotations

from typing import TypeVar

from sfllm.messages import (
    Capacity,
    Grant,
    GrantedRequest,
    Message,
    ModelCard,
    Sampling,
    WorkerHello,
    WorkerTokens,
    WorkerWelcome,
)
from sfllm.token_batch import rows
from sfllm.wire import Array, as_array
from sfllm_worker.engine.planned import PlannedEngine
from sfllm_worker.engine.planner import Limits
from sfllm_worker.mock.engine import MockEngine
from sfllm_worker.protocol import ClearOutbox, Outgoing, WorkerProtocol

Kind = TypeVar("Kind", bound=Message)

EPOCH = 9
LEASE = 4
BEAT_SECONDS = 1.0
LEASE_SECONDS = 5.0
STEP_SECONDS = 0.01
GATEWAY = b"g-1"


def mock_engine(
    max_sequences: int = 8,
    kv_tokens: int = 512,
    step_tokens: int = 16,
    block_size: int = 4,
    max_model_len: int = 128,
) -> MockEngine:
    return MockEngine(Limits(max_sequences, step_tokens, block_size), kv_tokens, max_model_len)


class Driver:
    """Plays scheduler and loop. `sent` is all that the protocol wanted to send, in order."""

    def __init__(self, engine: PlannedEngine, drain_seconds: float = 10.0) -> None:
        card = ModelCard("m", (), "m", 0, engine.max_model_len, 259, (256,), ())
        self.engine = engine
        hello = WorkerHello("w-1", card, Capacity(engine.max_sequences, engine.kv_tokens, 16))
        self.protocol = WorkerProtocol(engine, hello, drain_seconds)
        self.now = 100.0
        self.sent: list[Outgoing | ClearOutbox] = []

    def collect(self) -> list[Outgoing | ClearOutbox]:
        """What was sent since the last call."""
        new = self.protocol.take_outgoing()
        self.sent += new
        return new

    def messages(self, kind: type[Kind]) -> list[Kind]:
        """Messages of that kind among all that was sent so far."""
        self.collect()
        return [o.message for o in self.sent if isinstance(o, Outgoing) and isinstance(o.message, kind)]

    def tokens(self) -> dict[tuple[int, int], dict[int, int]]:
        """Token by index of every (handle, choice), of all that was sent so far."""
        self.collect()
        found: dict[tuple[int, int], dict[int, int]] = {}
        for outgoing in self.sent:
            if isinstance(outgoing, Outgoing) and isinstance(outgoing.message, WorkerTokens):
                for row in rows(outgoing.arrays):
                    place = found.setdefault((row.handle, row.choice), {})
                    place |= {row.start + index: token for index, token in enumerate(row.ids)}
        return found

    def tell(self, message: Message, *arrays: Array) -> None:
        self.protocol.handle(message, arrays, self.now)

    def wait(self, seconds: float) -> None:
        """Time passes, then what is due is done."""
        self.now += seconds
        self.protocol.tick(self.now)

    def join(self, lease: int = LEASE, epoch: int = EPOCH) -> None:
        self.tell(WorkerWelcome(epoch, lease, BEAT_SECONDS, LEASE_SECONDS))

    def grant(
        self,
        handle: int = 1,
        *,
        prompt: tuple[int, ...] = (1, 2, 3),
        choices: tuple[int, ...] = (0,),
        generated: tuple[tuple[int, ...], ...] | None = None,
        attempt: int = 0,
        lease: int = LEASE,
        gateway: bytes = GATEWAY,
        **sampling: object,
    ) -> None:
        """Grant one request."""
        outputs = generated or ((),) * len(choices)
        wanted = Sampling(**{"max_tokens": 8, "seed": handle, **sampling})  # type: ignore[arg-type]
        request = GrantedRequest(
            *(gateway, f"r{handle}", handle, attempt, choices, len(prompt), tuple(map(len, outputs))),
            sampling=wanted,
            queue_seconds=0.5,
        )
        flat = [token for tokens in outputs for token in tokens]
        self.tell(Grant(lease, (request,)), as_array("I", prompt), as_array("I", flat), as_array("Q", ()))

    def step(self, count: int = 1) -> None:
        """Run so many steps, as far as there is work."""
        for _ in range(count):
            if not self.engine.has_work:
                break
            started = self.now
            result = self.engine.step()
            self.now += STEP_SECONDS
            self.protocol.publish(result, started, self.now)

    def run(self) -> None:
        """Step until nothing is left to do."""
        self.step(2000)
        assert not self.engine.has_work

    def all_free(self) -> bool:
        """Whether nothing is held and every block is free."""
        self.protocol.check_idle()
        return self.engine.free_kv_tokens == self.engine.kv_tokens


def joined(engine: PlannedEngine | None = None, drain_seconds: float = 10.0) -> Driver:
    """A driver whose worker is welcome."""
    driver = Driver(engine or mock_engine(), drain_seconds)
    driver.join()
    return driver
