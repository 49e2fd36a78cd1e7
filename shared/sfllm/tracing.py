"""Traces of requests: where a process gets its `Tracer` from, if it is to have one.

Without `--otlp-endpoint` nothing of OpenTelemetry is imported, and there is no tracer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfllm.settings import CommonSettings

if TYPE_CHECKING:
    from sfllm.otlp import Tracer


def open_tracer(settings: CommonSettings, service: str, instance: str) -> Tracer | None:
    """The tracer of this process, `service` and a name that no other process has; None if tracing is off.

    Raises ValueError when what tracing needs is not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    try:
        from sfllm.otlp import Tracer  # noqa: PLC0415 - OpenTelemetry is optional
    except ImportError as error:
        raise ValueError(f"--otlp-endpoint needs pip install 'sfllm[tracing]' ({error})") from error
    return Tracer(settings.otlp_endpoint, settings.trace_sample_rate, service, instance)
