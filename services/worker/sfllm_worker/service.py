"""The worker's loop: drain the socket, run a step, send what came of it.

Nothing in the loop waits for anything but the model while there is work; without work it
sleeps on the socket until the next timer. What the messages mean is in `protocol.py`.
"""

from __future__ import annotations

import time

import structlog

from sfllm.scheduler_choice import SchedulerChoice
from sfllm.sockets import RECONNECT_SECONDS, OutboxFullError
from sfllm_worker.beats import Beater
from sfllm_worker.engine.interface import EngineInterface
from sfllm_worker.link import SchedulerLink
from sfllm_worker.metrics import WorkerMetrics
from sfllm_worker.protocol import WorkerProtocol
from sfllm_worker.protocol_results import Outgoing
from sfllm_worker.watchdog import Watchdog

_log = structlog.get_logger()

LONGEST_WAIT_SECONDS = 0.1
"""A signal that arrives just before the loop sleeps is noticed after this long."""

FAILURE_CHARACTERS = 200

SHOW_SECONDS = 0.5
"""What the engine holds is shown so often while it works: for any scrape that is often enough."""


class _StepAbandonedError(Exception):
    """A drain is over, and the step that runs is not worth waiting for."""


class WorkerService:
    """The only user of the protocol, the engine and the link from `run` on, which closes the link."""

    def __init__(
        self,
        engine: EngineInterface,
        protocol: WorkerProtocol,
        link: SchedulerLink,
        metrics: WorkerMetrics,
        watchdog: Watchdog,
        choice: SchedulerChoice,
    ) -> None:
        self._engine = engine
        self._protocol = protocol
        self._link = link
        self._metrics = metrics
        self._watchdog = watchdog
        self._choice = choice
        self._link.current = choice.current
        self._beater = Beater(self._send_beat)
        self._drain_wanted = False
        self._is_moving = False
        self._is_idle = False
        self._next_show = 0.0
        self._is_stepping = False
        self._overflow: str | None = None

    def drain(self) -> None:
        """Finish what is held, take no more, then let `run` return. Safe to call from a signal handler."""
        self._drain_wanted = True

    def end_drain(self) -> None:
        """The time for draining is over: do not wait for a step to end. Only for a signal handler."""
        if self._is_stepping:
            raise _StepAbandonedError

    def problem(self) -> str | None:
        """Why this process may have to be ended, or None. For the thread that answers health checks."""
        return self._watchdog.problem(time.monotonic())

    def unready(self) -> str | None:
        """Why this worker is given nothing at the moment, or None. For the same thread."""
        if self._drain_wanted or self._protocol.draining:
            return "draining"
        if self._protocol.lease is None:
            return self._link.other_version or "no scheduler has welcomed this worker"
        return None

    def run(self) -> int:
        """Serve until drained; the exit code: 1 when something failed, a step above all."""
        failure = ""
        with self._beater:
            try:
                while self._is_moving or not self._protocol.drained:
                    self._turn()
            except _StepAbandonedError:
                _log.warning("the drain is over within a step", held_requests=self._protocol.held_requests)
            except Exception as error:  # noqa: BLE001 - whatever it was: say so, then end the process
                _log.exception("the worker failed")
                failure = f"{type(error).__name__}: {error}"[:FAILURE_CHARACTERS]
            self._watchdog.stop()
            self._protocol.leave(failure)
            self._send_outgoing(time.monotonic())
        self._link.close()
        self._engine.close()
        return 1 if failure else 0

    def _turn(self) -> None:
        now = time.monotonic()
        self._watchdog.turn(now)
        if self._drain_wanted:
            self._is_moving = False
            self._protocol.drain(now)
        try:
            messages = self._link.receive()
        except OutboxFullError as error:
            self._overflow, messages = str(error), []
        for message, arrays in messages:
            self._protocol.handle(message, arrays, now)
        self._protocol.tick(now)
        self._send_outgoing(now)
        self._choose_scheduler(now)
        if self._engine.has_work:
            self._is_idle = False
            self._step()
        else:
            self._rest(now)

    def _choose_scheduler(self, now: float) -> None:
        """Ask after other schedulers, go on to the next when one is not there, move to a better one."""
        choice, link, protocol = self._choice, self._link, self._protocol
        link.explain(now)
        if not link.has_others:
            return
        if link.seconds_lost(now) >= RECONNECT_SECONDS and protocol.lease is not None:
            protocol.lose("the connection was lost", now)
        for answer in link.take_answers():
            choice.answered(answer.scheduler, answer.epoch, now)
        for index in choice.to_probe(now):
            link.probe(index)
        if self._is_moving:
            if protocol.drained:
                self._move(now)
            return
        choice.see(protocol.lease is not None, now)
        if link.current != choice.current:
            _log.warning("no welcome, trying another scheduler", scheduler=choice.current_address)
            link.turn_to(choice.current, parted=False)
        elif protocol.lease is not None and not protocol.draining and choice.better() is not None:
            self._is_moving = True
            protocol.drain(now)
            self._send_outgoing(now)

    def _move(self, now: float) -> None:
        """What was begun has ended, or had its time: part with this scheduler, say hello to a better one."""
        self._is_moving = False
        was_joined = self._protocol.lease is not None
        self._protocol.part(now)
        self._send_outgoing(now)
        better = self._choice.better()
        if better is None:  # it has gone again meanwhile
            better = self._choice.current
        self._choice.take(better, now)
        if better != self._link.current:
            _log.info("moving to another scheduler", scheduler=self._choice.current_address)
            self._link.turn_to(better, parted=was_joined)

    def _step(self) -> None:
        protocol = self._protocol
        started = time.monotonic()
        with self._beater.covering(protocol.beat(), protocol.next_beat, protocol.beat_seconds):
            self._is_stepping = True
            result = self._engine.step()
            while (rest := started + result.seconds - time.monotonic()) > 0:
                time.sleep(min(rest, LONGEST_WAIT_SECONDS))
            self._is_stepping = False
        ended = time.monotonic()
        self._watchdog.saw_step(ended - started)
        self._protocol.publish(result, started, ended)
        self._send_outgoing(ended)
        self._metrics.step(result, ended - started)
        if ended >= self._next_show:
            self._next_show = ended + SHOW_SECONDS
            self._show()

    def _show(self) -> None:
        self._metrics.step_curve(self._protocol.step_curve)
        self._metrics.state(self._engine)

    def _rest(self, now: float) -> None:
        if not self._is_idle:
            self._is_idle = True
            self._protocol.check_idle()
            self._show()
            self._next_show = now  # the next step is the first of others
        if not self._protocol.drained and not self._engine.idle():
            self._link.wait(min(self._protocol.seconds_to_timer(now), LONGEST_WAIT_SECONDS))

    def _send_outgoing(self, now: float) -> None:
        """Send what the protocol says. A scheduler that takes nothing for too long counts as lost."""
        try:
            self._raise_overflow()
            for outgoing in self._protocol.take_outgoing():
                if isinstance(outgoing, Outgoing):
                    self._link.send(*outgoing)
                else:
                    self._link.clear()
        except OutboxFullError as error:
            self._protocol.lose(str(error), now)

    def _raise_overflow(self) -> None:
        overflow, self._overflow = self._overflow, None
        if overflow is not None:
            raise OutboxFullError(overflow)

    def _send_beat(self, beat: Outgoing) -> None:
        """For the beater's thread, during a step."""
        try:
            self._link.send(beat.message, beat.arrays)
        except OutboxFullError as error:
            self._overflow = str(error)
