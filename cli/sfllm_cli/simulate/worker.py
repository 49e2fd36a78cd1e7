"""A modelled worker's side of the protocol: grants in; progress, ends and beats out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from sfllm.messages import (
    Drain,
    Grant,
    Message,
    ModelCard,
    Recall,
    WorkerBeat,
    WorkerBye,
    WorkerCancel,
    WorkerDraining,
    WorkerFinished,
    WorkerHello,
    WorkerProgress,
    WorkerReturned,
    WorkerWelcome,
)
from sfllm.wire import Array, as_array
from sfllm_cli.simulate.agenda import Agenda
from sfllm_cli.simulate.engine import ModelledEngine
from sfllm_cli.simulate.membership import Membership
from sfllm_cli.simulate.profiles import Profile
from sfllm_cli.simulate.reports import GrantedNames, finished
from sfllm_cli.simulate.schedulers import Schedulers
from sfllm_cli.simulate.stepping import Stepping
from sfllm_cli.simulate.work import Key, Plan, Work
from sfllm_scheduler.core.events import FromWorker

CARD = ModelCard("simulated", (), "simulated", 0, 2**31, 0, (), ())

MOVE_SECONDS = 30.0
"""How long what has begun may take before a worker moves to another scheduler: `--drain-seconds`."""


class Listener(Protocol):
    """What a request's client sees of its tokens; `gateways.py` does."""

    def first_token(self, gateway: int, handle: int, now: float) -> None:
        """An attempt has chosen a token for the first time."""

    def tokens_of(self, gateway: int, handle: int) -> int:
        """How many tokens it is to get in all."""

    def names_of(self, gateway: int, handle: int) -> Sequence[int]:
        """Names of its beginnings, those that its answer is part of included."""

    def lost(self, gateway: int, handle: int, attempt: int, left: int) -> None:
        """Its worker is gone or has dropped it, and so many tokens have not come."""


class ModelledWorker:
    """One run of a worker: it has a lease of one scheduler or none.

    `on_step(rows, seconds, steps)` hears of every decode step, for the times between tokens.
    """

    def __init__(
        self,
        agenda: Agenda,
        peer: bytes,
        profile: Profile,
        schedulers: Schedulers,
        listener: Listener,
        on_step: Callable[[int, float, int], None],
    ) -> None:
        self.peer = peer
        self.alive = True
        self.engine = ModelledEngine(profile)
        self._agenda = agenda
        self._profile = profile
        self._schedulers = schedulers
        self._listener = listener
        self._membership = Membership(agenda, peer.decode(), schedulers, self)
        self._stepping = Stepping(agenda, self.engine, on_step, self._completed, self._between)
        self._lease = 0
        self._beat_seconds = 0.0
        self._joined_times = 0
        self._grants = 0
        self._said = (0, 0)
        self._names = GrantedNames()
        self._cancelled: list[Work] = []
        self._draining = False
        self._is_moving = False
        self._is_cut_off = False

    @property
    def scheduler(self) -> int:
        """The number of the one that it belongs to, or says hello to."""
        return self._membership.current

    @property
    def joined(self) -> bool:
        """Whether it has a lease."""
        return self._lease > 0

    @property
    def draining(self) -> bool:
        """Whether it takes nothing new."""
        return self._draining

    def start(self) -> None:
        """Say hello."""
        self.hello()
        self._membership.start()

    def hello(self) -> None:
        """Ask the current scheduler for a lease."""
        self._is_cut_off = False
        model_len = self._profile.max_model_len
        card = ModelCard(CARD.name, (), CARD.root, 0, model_len, 0, (), ())
        self._say(WorkerHello(self.peer.decode(), card, self._profile.capacity))

    def receive(self, scheduler: int, message: Message, arrays: tuple[Array, ...]) -> None:
        """A message of a scheduler; of one that it has left, or lost, nothing is taken."""
        if not self.alive or scheduler != self.scheduler or self._is_cut_off:
            return
        match message:
            case WorkerWelcome():
                self._join(message)
            case Grant() if message.lease == self._lease:
                self._accept(message, arrays)
            case WorkerCancel() if message.lease == self._lease:
                self._cancel((int(message.gateway), message.handle), message.attempt)
            case Recall() if message.lease == self._lease:
                self._give_back(message)
            case Drain():
                self.drain()
        self._stepping.go_on()

    def slow_down(self, factor: float) -> None:
        """From its next step on it takes so many times as long."""
        self.engine.slow_down(factor)

    def drain(self) -> None:
        """Finish what has begun, give back the rest, leave."""
        self._is_moving = False
        if self._draining or not self.alive:
            return
        self._begin_drain()
        self._leave_if_drained()

    def begin_move(self) -> None:
        """The same, but to join a better scheduler; what does not end in time is left to others."""
        self._is_moving = True
        self._begin_drain()
        self._agenda.after(MOVE_SECONDS, self._end_move, self._joined_times)
        self._leave_if_drained()

    def die(self) -> None:
        """The process is killed; clients have what had come until now."""
        self.alive = False
        self._drop_all()

    def cut_off(self) -> None:
        """Its scheduler is gone. It steps on until it knows, but what it makes nobody gets: drop it now."""
        self._drop_all()
        self._is_cut_off = True

    def notice(self) -> None:
        """It knows that its scheduler is gone: try it again, and then others."""
        if not self.alive or not self._is_cut_off:
            return
        self._lease = 0
        if self._is_moving:
            self._move()
        else:
            self.hello()

    def came_back(self, scheduler: int) -> None:
        """A scheduler that was gone runs again."""
        if self.alive:
            self._membership.came_back(scheduler)

    def _join(self, welcome: WorkerWelcome) -> None:
        self._lease, self._beat_seconds = welcome.lease, welcome.beat_seconds
        self._joined_times += 1
        self._grants, self._said = 0, (0, 0)
        self.engine.shortest_first = welcome.shortest_first
        self._beat(self._joined_times)

    def _beat(self, joined_times: int) -> None:
        if not self.alive or not self._lease or joined_times != self._joined_times:
            return
        engine = self.engine
        engine.follow()
        beat = WorkerBeat(
            lease=self._lease,
            step=engine.steps,
            running=engine.running,
            waiting=engine.waiting,
            free_kv_tokens=engine.free_tokens,
            digest=self._schedulers.digest_of_worker(self.scheduler, self.peer),
            slots=engine.slots,
            step_curve=tuple(engine.curve),
        )
        self._say(beat, as_array("Q", self._names.cached(engine.blocks.cache)))
        self._agenda.after(self._beat_seconds, self._beat, joined_times)

    def _accept(self, grant: Grant, arrays: tuple[Array, ...]) -> None:
        self._grants += 1
        for request in grant.requests:
            key = int(request.gateway), request.handle
            so_far = request.generated_counts[0]
            outputs = self._listener.tokens_of(*key) - so_far
            names = self._listener.names_of(*key)
            work = Work(key, request.attempt, request.prompt_count, outputs, names, so_far)
            work.granted_at, work.queue_seconds = self._agenda.now, request.queue_seconds
            if self._draining:
                self._say(WorkerReturned(self._lease, request.gateway, request.handle, request.attempt))
            else:
                self.engine.add(work)
        self._names.add(arrays[2])

    def _give_back(self, recall: Recall) -> None:
        work = self.engine.find((int(recall.gateway), recall.handle))
        if work is not None and work.attempt == recall.attempt:
            self._return(work)
            self._say_progress()

    def _return(self, work: Work) -> None:
        """Let go of a request that has not begun; one that has stays."""
        if not work.begun:
            gateway, handle = work.key
            self.engine.remove(work)
            self._say(WorkerReturned(self._lease, b"%d" % gateway, handle, work.attempt))

    def _cancel(self, key: Key, attempt: int) -> None:
        """Drop a request, after the step that is under way."""
        work = self.engine.find(key)
        if work is not None and work.attempt <= attempt:
            self._cancelled.append(work)
            if not self._stepping.is_stepping:
                self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        """Those that have not ended in the meantime."""
        for work in self._cancelled:
            if self.engine.find(work.key) is work:
                self.engine.remove(work)
        if self._cancelled:
            self._cancelled.clear()
            self._say_progress()

    def _between(self) -> None:
        self._drop_cancelled()
        self._leave_if_drained()

    def _completed(self, plan: Plan, first: list[Work], ended: list[Work]) -> None:
        now = self._agenda.now
        for work in first:
            if not work.first_at:
                work.first_at = now
                self._listener.first_token(*work.key, now)
        for work in ended:
            self._say_finished(work)
        if plan.chunks:
            self._say_progress()

    def _say_progress(self) -> None:
        """What is left to prefill, if that was not said yet."""
        said = self._grants, self.engine.pending_tokens
        if said != self._said:
            self._said = said
            self._say(WorkerProgress(self._lease, *said))

    def _say_finished(self, work: Work) -> None:
        gateway, handle = work.key
        end = finished(work, self._listener.tokens_of(gateway, handle), self._agenda.now)
        self._say(WorkerFinished(self._lease, b"%d" % gateway, end))

    def _begin_drain(self) -> None:
        self._draining = True
        self._say(WorkerDraining(self._lease))
        for work in self.engine.works():
            self._return(work)

    def _leave_if_drained(self) -> None:
        if self._draining and self.alive and not self.engine.works():
            self._say(WorkerBye(self._lease))
            if self._is_moving:
                self._move()
            else:
                self.alive = False

    def _end_move(self, joined_times: int) -> None:
        """The time for a move is over: what has not ended goes on at another worker."""
        if self.alive and self._is_moving and joined_times == self._joined_times:
            self._drop_all()
            self._leave_if_drained()

    def _move(self) -> None:
        self._is_moving = self._draining = False
        self._lease = 0
        self._membership.move()

    def _drop_all(self) -> None:
        """Stop, and forget everything; clients have what had come until now."""
        self._stepping.stop()
        for work in self.engine.works():
            if work not in self._cancelled:
                self._listener.lost(*work.key, work.attempt, self.engine.left_of(work))
            self.engine.remove(work)
        self._cancelled.clear()

    def _say(self, message: Message, *arrays: Array) -> None:
        self._schedulers.post(self.scheduler, FromWorker(self.peer, message, arrays))
