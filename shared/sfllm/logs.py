"""Structured logs: one event a line, with the fields that matter (`request_id` above all).

`logs.setup` is called once at process start; afterwards every module uses
`structlog.get_logger()`. Records of the standard library (uvicorn's) come out the same way.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def setup(service: str, level: str = "info", log_format: str = "text") -> None:
    """Send logs of this process to standard error, as text for people or JSON for machines."""

    def add_service(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
        event.setdefault("service", service)
        return event

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_service,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        # Plain tracebacks: pretty ones with local variables take seconds to make.
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info if log_format == "json" else _keep,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def _keep(_logger: Any, _method: str, event: Any) -> Any:
    """Leaves the event as it is: the console renderer formats exceptions itself."""
    return event
