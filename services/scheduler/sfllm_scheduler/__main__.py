"""`python -m sfllm_scheduler`: run one scheduler until SIGTERM or SIGINT."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import structlog
import zmq

from sfllm import config, logs
from sfllm.admin import AdminServer
from sfllm.link_keys import LinkKeysError
from sfllm.metrics import Metrics
from sfllm.settings import GatewaySettings, SchedulerSettings, WorkerSettings
from sfllm.sockets import random_identity
from sfllm.tracing import open_tracer
from sfllm_scheduler.service import SchedulerService
from sfllm_scheduler.traces import QueueSpans

log = structlog.get_logger()

STOP_SECONDS = 8.0
"""How long stopping may take; it takes a fraction of a second unless something hangs."""


def main() -> int:
    """Parse the command line and run; the exit code. A signal ends it within `STOP_SECONDS`."""
    settings = config.parse(
        SchedulerSettings,
        prog="python -m sfllm_scheduler",
        description="The scheduler: queues requests, batches them by length and routes them to workers.",
        known=[GatewaySettings, WorkerSettings],
    )
    logs.setup("scheduler", settings.log_level, settings.log_format)
    if settings.lease_seconds <= settings.beat_seconds:
        log.error("--lease-seconds must be longer than --beat-seconds")
        return 2
    try:
        tracer = open_tracer(settings, "scheduler", random_identity(b"s-").decode())
    except ValueError as error:
        log.error(str(error))
        return 2
    try:
        return _run(settings, None if tracer is None else QueueSpans(tracer))
    finally:
        if tracer is not None:
            tracer.close()


def _run(settings: SchedulerSettings, spans: QueueSpans | None) -> int:
    """Serve until told to stop; the exit code."""
    stopping: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)
        # Whatever hangs from now on (a log that nobody reads, say), the kernel ends the process then.
        signal.setitimer(signal.ITIMER_REAL, STOP_SECONDS)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    metrics = Metrics(settings.metrics_prefix)
    try:
        service = SchedulerService(settings, metrics, spans=spans)
    except LinkKeysError as error:
        log.error(str(error))
        return 2
    except (zmq.ZMQError, OSError):
        return 1  # the service has said which address or file
    admin: AdminServer | None = None
    try:
        admin = _admin_server(settings, metrics, service)
        log.info(
            "scheduler ready",
            gateways=service.gateways.address,
            workers=service.workers.address,
            assets=service.assets.address,
            admin_port=admin.port if admin else 0,
            epoch=service.epoch,
        )
        service.run(lambda: bool(stopping))
        log.info("scheduler stops", signal=signal.Signals(stopping[0]).name)
    except _AdminPortError as error:
        log.error("cannot serve the admin port", port=settings.admin_port, error=str(error))
        return 1
    finally:
        service.close()
        if admin is not None:
            admin.close()
    return 0


class _AdminPortError(Exception):
    """The admin port is taken or not allowed."""


def _admin_server(
    settings: SchedulerSettings, metrics: Metrics, service: SchedulerService
) -> AdminServer | None:
    if not settings.admin_port:
        return None
    try:
        return AdminServer(settings.admin_host, settings.admin_port, metrics, service.problem)
    except OSError as error:
        raise _AdminPortError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
