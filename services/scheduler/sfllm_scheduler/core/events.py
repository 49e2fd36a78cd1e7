"""What goes into the core (events) and what comes out of it (actions)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sfllm.messages import Message, ModelCard
from sfllm.wire import Array

Field = str | int | float | tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FromGateway:
    """A message of a gateway; `peer` is its routing id."""

    peer: bytes
    message: Message
    arrays: tuple[Array, ...] = ()


@dataclass(frozen=True, slots=True)
class FromWorker:
    """A message of a worker; `peer` is its routing id."""

    peer: bytes
    message: Message
    arrays: tuple[Array, ...] = ()


@dataclass(frozen=True, slots=True)
class GatewayUnreachable:
    """Nothing can be sent to this gateway: it is gone, or takes no more."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class WorkerUnreachable:
    """Nothing can be sent to this worker: it is gone, or takes no more."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class ModelReady:
    """Every asset of this card is here, so gateways can be told of the model."""

    card: ModelCard


@dataclass(frozen=True, slots=True)
class Tick:
    """The end of a turn: time has passed, and requests that came in it can be granted together."""


Event = FromGateway | FromWorker | GatewayUnreachable | WorkerUnreachable | ModelReady | Tick


@dataclass(frozen=True, slots=True)
class ToGateway:
    """Send this to a gateway."""

    peer: bytes
    message: Message
    arrays: tuple[Array, ...] = ()


@dataclass(frozen=True, slots=True)
class ToWorker:
    """Send this to a worker."""

    peer: bytes
    message: Message
    arrays: tuple[Array, ...] = ()


@dataclass(frozen=True, slots=True)
class ForgetGateway:
    """A gateway is out of the tables: drop what still waits for it."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class ForgetWorker:
    """A worker is out of the tables: drop what still waits for it."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class NeedAssets:
    """A worker joined with this card: its assets are wanted, and that peer will offer them."""

    peer: bytes
    card: ModelCard


Happening = Literal[
    "admitted",
    "granted",
    "finished",
    "cancelled",
    "rejected",
    "quarantined",
    "interrupted",
    "recalled",
    "dropped",
    "malformed",
    "reconciled",
    "worker_joined",
    "worker_draining",
    "worker_failed",
    "worker_lost",
    "worker_refused",
    "gateway_joined",
    "gateway_lost",
]


@dataclass(frozen=True, slots=True)
class Record:
    """Something worth a log line or a metric."""

    event: Happening
    fields: dict[str, Field] = field(default_factory=dict)


Action = ToGateway | ToWorker | ForgetGateway | ForgetWorker | NeedAssets | Record
