"""The scheduler's decisions as one function: an event and the time in, actions out."""

from __future__ import annotations

from sfllm.messages import (
    NO_LEASE,
    Cancel,
    GatewayBeat,
    GatewayBye,
    GatewayHeld,
    GatewayHello,
    Message,
    Resend,
    Submit,
    WorkerBeat,
    WorkerBye,
    WorkerDraining,
    WorkerFault,
    WorkerFinished,
    WorkerHeld,
    WorkerHello,
    WorkerProgress,
    WorkerPromptLogprobs,
    WorkerReturned,
    WorkerTokens,
)
from sfllm.wire import Array
from sfllm_scheduler.core import admission, endings, leases, overdue, recall, reconcile, relay, routing
from sfllm_scheduler.core.events import (
    Action,
    Event,
    FromGateway,
    FromWorker,
    GatewayUnreachable,
    ModelReady,
    Tick,
    WorkerUnreachable,
)
from sfllm_scheduler.core.integrity import check_integrity
from sfllm_scheduler.core.state import PolicyValues, State
from sfllm_scheduler.core.workers import Worker


class SchedulerCore:
    """Queue, cohorts, credits, leases. `epoch` tells this scheduler's process start from others.

    `now` is in seconds on a clock that never goes back. Messages change the tables and are
    answered; `Tick`, due at the end of every turn of the caller's loop, grants what waits
    (so that requests of one turn can form a cohort) and does what time brings.
    """

    def __init__(self, policy: PolicyValues, epoch: int) -> None:
        self.state = State(policy, epoch)

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about `event`. Never raises for anything that a peer can send."""
        self.state.started = min(self.state.started, now)
        match event:
            case Tick():
                self._tick(now)
            case FromWorker():
                self._from_worker(event, now)
            case FromGateway():
                self._from_gateway(event, now)
            case GatewayUnreachable():
                leases.gateway_lost(self.state, event.peer, "unreachable", now)
            case WorkerUnreachable():
                leases.worker_lost(self.state, event.peer, "unreachable", now)
            case ModelReady():
                self._model_ready(event)
        actions, self.state.actions = self.state.actions, []
        return actions

    def check_integrity(self) -> None:
        """Raise `InvariantError` when the tables contradict each other. Reads everything."""
        check_integrity(self.state)

    def _tick(self, now: float) -> None:
        leases.sweep(self.state, now)
        overdue.reject_expired(self.state, now)
        overdue.reject_workerless(self.state, now)
        routing.grant_all(self.state, now)
        recall.recall(self.state, now)
        leases.send_beats(self.state, now)

    def _from_gateway(self, event: FromGateway, now: float) -> None:
        state, peer, message = self.state, event.peer, event.message
        gateway = state.gateways.get(peer)
        if gateway is not None:
            gateway.heard = now
        match message:
            case GatewayHello():
                leases.gateway_hello(state, peer, now)
            case Submit():
                admission.submit(state, peer, message, event.arrays, now)
            case GatewayBye():
                leases.gateway_lost(state, peer, "bye", now)
            case _ if gateway is None:
                admission.answer_unknown_gateway(state, peer)
            case GatewayBeat():
                reconcile.compare_gateway(state, gateway, message.digest)
            case GatewayHeld():
                reconcile.gateway_held(state, gateway, message, event.arrays, now)
            case Cancel():
                endings.cancel(state, peer, message, now)
            case Resend():
                reconcile.resend(state, gateway, message, now)
            case _:
                raise TypeError(f"{type(message).__name__} is not a gateway's message")

    def _from_worker(self, event: FromWorker, now: float) -> None:
        state, message = self.state, event.message
        if isinstance(message, WorkerHello):
            leases.worker_hello(state, event.peer, message, now)
            return
        worker = state.workers.get(event.peer)
        if worker is None or worker.lease != getattr(message, "lease", None):
            if getattr(message, "lease", None) != NO_LEASE:
                state.record("dropped", kind=f"stale {type(message).__name__}", worker=event.peer.hex())
            if isinstance(message, WorkerBeat):
                leases.answer_stray_beat(state, event.peer, now)
            return
        worker.heard = now
        self._from_leased(worker, message, event.arrays, now)

    def _from_leased(self, worker: Worker, message: Message, arrays: tuple[Array, ...], now: float) -> None:
        state = self.state
        match message:
            case WorkerTokens():
                relay.tokens(state, worker, message, arrays)
            case WorkerPromptLogprobs():
                relay.prompt_logprobs(state, message, arrays)
            case WorkerFinished():
                relay.finished(state, worker, message, arrays, now)
            case WorkerBeat():
                relay.beat(state, worker, message, arrays)
                reconcile.compare_worker(state, worker, message.digest)
            case WorkerProgress():
                relay.progress(state, worker, message)
            case WorkerFault():
                relay.fault(state, worker, message, now)
            case WorkerDraining():
                leases.worker_draining(state, worker, now)
            case WorkerHeld():
                reconcile.worker_held(state, worker, message, arrays, now)
            case WorkerReturned():
                relay.returned(state, worker, message, now)
            case WorkerBye():
                leases.worker_bye(state, worker, message.failure, now)
            case _:
                raise TypeError(f"{type(message).__name__} is not a worker's message")

    def _model_ready(self, event: ModelReady) -> None:
        model = self.state.models.get(event.card.name)
        if model is not None and not model.assets_ready and model.card.assets == event.card.assets:
            model.assets_ready = True
            self.state.announce_models()
