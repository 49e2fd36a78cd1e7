"""What goes into the core (events) and what comes out of it (actions).

They are msgspec structs, because several are made for every message: a frozen dataclass takes eight times
as long to make.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sfllm.messages import Message, ModelCard
from sfllm.wire import Array

Field = str | int | float | tuple[float, ...]


class FromGateway(msgspec.Struct, frozen=True, gc=False):
    """A message of a gateway; `peer` is its routing id."""

    peer: bytes
    message: Message
    arrays: tuple[Array, ...] = ()


class FromWorker(msgspec.Struct, frozen=True, gc=False):
    """A message of a worker; `peer` is its routing id."""

    peer: bytes
    message: Message
    arrays: tuple[Array, ...] = ()


class GatewayUnreachable(msgspec.Struct, frozen=True, gc=False):
    """Nothing can be sent to this gateway: it is gone, or takes no more."""

    peer: bytes


class WorkerUnreachable(msgspec.Struct, frozen=True, gc=False):
    """Nothing can be sent to this worker: it is gone, or takes no more."""

    peer: bytes


class ModelReady(msgspec.Struct, frozen=True, gc=False):
    """Every asset of this card is here, so gateways can be told of the model."""

    card: ModelCard


class Tick(msgspec.Struct, frozen=True, gc=False):
    """The end of a turn: time has passed, and requests that came in it can be granted together."""


Event = FromGateway | FromWorker | GatewayUnreachable | WorkerUnreachable | ModelReady | Tick


class ToGateway(msgspec.Struct, frozen=True, gc=False):
    """Send this to a gateway."""

    peer: bytes
    message: Message
    arrays: tuple[Array, ...] = ()


class ToWorker(msgspec.Struct, frozen=True, gc=False):
    """Send this to a worker."""

    peer: bytes
    message: Message
    arrays: tuple[Array, ...] = ()


class ForgetGateway(msgspec.Struct, frozen=True, gc=False):
    """A gateway is out of the tables: drop what still waits for it."""

    peer: bytes


class ForgetWorker(msgspec.Struct, frozen=True, gc=False):
    """A worker is out of the tables: drop what still waits for it."""

    peer: bytes


class NeedAssets(msgspec.Struct, frozen=True, gc=False):
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


class Record(msgspec.Struct, frozen=True, gc=False):
    """Something worth a log line or a metric."""

    event: Happening
    fields: dict[str, Field] = {}


Action = ToGateway | ToWorker | ForgetGateway | ForgetWorker | NeedAssets | Record
