"""The scheduler process: one synchronous loop around the pure core and three bound sockets."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import structlog
import zmq

from sfllm.link_auth import LinkAuthenticator
from sfllm.link_keys import LinkKeysError
from sfllm.messages import (
    ASSETS,
    GATEWAY_TO_SCHEDULER,
    WORKER_TO_SCHEDULER,
    GatewayBye,
    Grant,
    Message,
    WorkerBye,
    WorkerTokens,
)
from sfllm.metrics import Metrics
from sfllm.settings import SchedulerSettings
from sfllm_scheduler.assets import AssetRelay
from sfllm_scheduler.core.core import SchedulerCore
from sfllm_scheduler.core.events import (
    Action,
    Event,
    ForgetGateway,
    ForgetWorker,
    FromGateway,
    FromWorker,
    GatewayUnreachable,
    ModelReady,
    NeedAssets,
    Record,
    Tick,
    ToGateway,
    ToWorker,
    WorkerUnreachable,
)
from sfllm_scheduler.core.rate_limits import Limits
from sfllm_scheduler.core.state import PolicyValues
from sfllm_scheduler.link import Link
from sfllm_scheduler.observe import Observer
from sfllm_scheduler.recorder import Recorder
from sfllm_scheduler.traces import QueueSpans

log = structlog.get_logger()

MESSAGES_A_TURN = 256
"""Taken from one link before the others get their turn."""

IDLE_MILLISECONDS = 100
FLUSH_MILLISECONDS = 2
CLOSING_TURNS = 250
STALLED_SECONDS = 10.0
_POLLIN = int(zmq.POLLIN)  # pyzmq's enumeration makes a poll several times slower


class SchedulerService:
    """Owns the sockets and the core from construction until `close`.

    Raises zmq.ZMQError if an address is bound elsewhere, OSError if the record cannot be written,
    `LinkKeysError` for keys that cannot be used.

    Everything but `problem` is called from one thread.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        spans: QueueSpans | None = None,
    ) -> None:
        self._clock = clock
        self._spans = spans
        self._observer = Observer(metrics)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.epoch = secrets.randbits(62)
        self.core = SchedulerCore(policy_values(settings), self.epoch)
        self._decide = self.core.handle
        self._recorder: Recorder | None = None
        self._relay = AssetRelay()
        self._links: list[Link] = []
        self._authenticator: LinkAuthenticator | None = None
        try:
            if settings.link_keys:
                self._authenticator = LinkAuthenticator(self._context, settings.link_keys)
            metrics.links(encrypted=self._authenticator is not None)
            self.gateways = self._bind("gateway", settings.gateway_address, GATEWAY_TO_SCHEDULER)
            self.workers = self._bind("worker", settings.worker_address, WORKER_TO_SCHEDULER)
            self.assets = self._bind("asset", settings.asset_address, ASSETS)
            if settings.record is not None:
                self._record(settings.record, settings.record_max_bytes)
        except (zmq.ZMQError, OSError, LinkKeysError):
            self.close()
            raise
        self._poller = zmq.Poller()
        for link in self._links:
            self._poller.register(link.socket, _POLLIN)
        # Beats are sent by ticks, so a turn must not be longer than a fraction of their interval.
        self._idle_milliseconds = max(1, min(IDLE_MILLISECONDS, int(settings.beat_seconds * 250)))
        self._turned_at = self._ticked_at = clock()
        self._waiting = False

    def _bind(self, name: str, address: str, kinds: tuple[type[Message], ...]) -> Link:
        try:
            count = self._observer.count_malformed
            link = Link(name, self._context, address, kinds, count, self._authenticator)
        except zmq.ZMQError as error:
            log.error("cannot bind", link=name, address=address, error=str(error))
            raise
        self._links.append(link)
        return link

    def _record(self, path: str, max_bytes: int) -> None:
        try:
            self._recorder = Recorder(Path(path), max_bytes, self.core, version("sfllm"))
        except OSError as error:
            log.error("cannot record", file=path, error=str(error))
            raise
        self._decide = self._recorder.handle

    def run(self, stopped: Callable[[], bool]) -> None:
        """Turn until `stopped()`; it is asked at least every tenth of a second."""
        while not stopped():
            self.turn()

    def turn(self) -> None:
        """Wait a moment for messages, handle what came, let time pass, send.

        A turn that only passes tokens on ends there: it comes once for every step of every worker, and
        tokens change nothing here. Between ticks there is as much time then as without any message.
        """
        ready = dict(self._poller.poll(FLUSH_MILLISECONDS if self._waiting else self._idle_milliseconds))
        now = self._turned_at = self._clock()
        if self.gateways.socket in ready:
            for peer, (message, arrays) in self.gateways.receive(MESSAGES_A_TURN, now):
                self._handle(FromGateway(peer, message, arrays), now)
        only_tokens = len(ready) == 1 and self.workers.socket in ready
        if self.workers.socket in ready:
            for peer, (message, arrays) in self.workers.receive(MESSAGES_A_TURN, now):
                self._handle(FromWorker(peer, message, arrays), now)
                only_tokens = only_tokens and isinstance(message, WorkerTokens)
        if self.assets.socket in ready:
            for peer, (message, _) in self.assets.receive(MESSAGES_A_TURN, now):
                self._send_assets(self._relay.handle(peer, message, now), now)
        tick_due = (now - self._ticked_at) * 1000 >= self._idle_milliseconds
        if tick_due or not only_tokens or self.gateways.has_waiting:
            self._tick(now)

    def _tick(self, now: float) -> None:
        """Let time pass, and send what waits."""
        self._ticked_at = now
        self._send_assets(self._relay.tick(now), now)
        for card in self._relay.take_ready():
            log.info("model ready", model=card.name, assets=len(card.assets))
            self._handle(ModelReady(card), now)
        if self._authenticator is not None:
            self._authenticator.look(now)
            self._part_with_revoked(now)
        self._handle(Tick(), now)
        self._flush(now)
        for link in self._links:
            if refused := link.take_refused(now):
                self._observer.count_refused(link.name, refused)
        for failure in self._relay.failures:
            log.warning("asset not pulled", reason=failure)
        self._relay.failures.clear()
        self._observer.refresh(self.core.state, now)
        self._waiting = any(link.has_waiting for link in self._links)

    def problem(self) -> str | None:
        """Why this process cannot go on, or None. Any thread may ask."""
        silent = self._clock() - self._turned_at
        return f"the loop has not turned for {silent:.0f} s" if silent > STALLED_SECONDS else None

    def close(self) -> None:
        """Send what waits, for half a second at most, and close. Peers tell all to the next scheduler."""
        for _ in range(CLOSING_TURNS):
            if not any(link.has_waiting for link in self._links):
                break
            for link in self._links:
                link.flush()
            time.sleep(FLUSH_MILLISECONDS / 1000)
        for link in self._links:
            link.close()
        if self._recorder is not None:
            self._recorder.close()
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.term()

    def _handle(self, event: Event, now: float) -> None:
        """Give an event to the core and do what it says, and what follows from failures to do so."""
        failures = self._perform_all(self._decide(event, now), now)
        if failures:
            events = deque(failures)
            while events:
                events += self._perform_all(self._decide(events.popleft(), now), now)

    def _perform_all(self, actions: list[Action], now: float) -> list[Event]:
        """Do what the core said; what failed are further events for it."""
        return [failed for action in actions if (failed := self._perform(action, now)) is not None]

    def _perform(self, action: Action, now: float) -> Event | None:
        match action:
            case ToGateway():
                if not self.gateways.send(action.peer, action.message, action.arrays):
                    return GatewayUnreachable(action.peer)
            case ToWorker():
                if not self.workers.send(action.peer, action.message, action.arrays):
                    return WorkerUnreachable(action.peer)
                if self._spans is not None and isinstance(action.message, Grant):
                    self._spans.granted(action.peer, action.message, now)
            case Record():
                self._observer.record(action)
                if self._spans is not None:
                    self._spans.ended(action.event, action.fields, now)
            case NeedAssets():
                self._relay.want(action.card)
            case ForgetGateway():
                self.gateways.forget(action.peer)
                self.assets.forget(action.peer)
            case ForgetWorker():
                self.workers.forget(action.peer)
                self.assets.forget(action.peer)
                self._send_assets(self._relay.forget(action.peer, now), now)
        return None

    def _send_assets(self, outgoing: list[tuple[bytes, Message]], now: float) -> None:
        queue = deque(outgoing)
        while queue:
            peer, message = queue.popleft()
            if not self.assets.send(peer, message):
                queue.extend(self._relay.forget(peer, now))

    def _part_with_revoked(self, now: float) -> None:
        """Say goodbye in the name of those whose keys were taken away: what they held goes to others.

        They did not crash, so that nothing is suspected of what they ran.
        """
        for peer in self.assets.take_revoked():
            self._send_assets(self._relay.forget(peer, now), now)
        for peer in self.gateways.take_revoked():
            self._handle(FromGateway(peer, GatewayBye(self.epoch)), now)
        for peer in self.workers.take_revoked():
            worker = self.core.state.workers.get(peer)
            if worker is not None:
                self._handle(FromWorker(peer, WorkerBye(worker.lease)), now)

    def _flush(self, now: float) -> None:
        for peer in self.gateways.flush():
            self._handle(GatewayUnreachable(peer), now)
        for peer in self.workers.flush():
            self._handle(WorkerUnreachable(peer), now)
        for peer in self.assets.flush():
            self._send_assets(self._relay.forget(peer, now), now)


def policy_values(settings: SchedulerSettings) -> PolicyValues:
    """The part of the settings that the core decides by."""
    return PolicyValues(
        policy=settings.policy,
        max_queue_requests=settings.max_queue_requests,
        max_overtakes=settings.max_overtakes,
        target_ttft_seconds=settings.target_ttft_seconds,
        tenant_weights=tuple(map(_weight, settings.tenant_weights)),
        tenant_requests_per_minute=settings.tenant_requests_per_minute,
        tenant_tokens_per_minute=settings.tenant_tokens_per_minute,
        tenant_limits=tuple(map(_limits, settings.tenant_limits)),
        worker_wait_seconds=settings.worker_wait_seconds,
        beat_seconds=settings.beat_seconds,
        lease_seconds=settings.lease_seconds,
    )


def _weight(entry: str) -> tuple[str, float]:
    """Name and number of an entry like name=2; the settings have checked its form."""
    name, _, weight = entry.rpartition("=")
    return name, float(weight)


def _limits(entry: str) -> tuple[str, Limits]:
    """Name and limits of an entry like name=60:20000, whose form the settings have checked."""
    name, _, numbers = entry.rpartition("=")
    requests, _, tokens = numbers.partition(":")
    return name, Limits(int(requests) if requests else None, int(tokens) if tokens else None)
