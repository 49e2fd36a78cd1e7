"""Utilization and memory of this worker's GPU, read through NVML when metrics are scraped.

NVML is the driver's own interface for monitoring, as nvidia-smi uses it: reading it does not touch what
runs on the device. Without it, or for a GPU that it does not know, a worker runs just as well.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any, NamedTuple

import structlog

_log = structlog.get_logger()

UNKNOWN = float("nan")
"""What Prometheus shows for a value that cannot be read at the moment."""


class GpuMemory(NamedTuple):
    """Bytes of a GPU's memory, whichever process uses them."""

    used: float
    free: float


class GpuTelemetry:
    """One GPU as NVML sees it. Safe to use from any thread."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        self._lock = threading.Lock()
        self._complained = False

    @classmethod
    def open(cls, uuid: str, nvml: Any = None) -> GpuTelemetry | None:
        """The GPU with that UUID (`GPU-...`), or None, with one line in the log, if it cannot be watched.

        `nvml` is NVML's module, `pynvml` of nvidia-ml-py unless given.
        """
        try:
            nvml = nvml or importlib.import_module("pynvml")
        except ImportError:
            _log.info("no GPU metrics: nvidia-ml-py is not installed")
            return None
        try:
            nvml.nvmlInit()
            return cls(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
        except nvml.NVMLError as error:
            _log.warning("no GPU metrics", gpu=uuid, reason=str(error))
            return None

    def utilization(self) -> float:
        """Share of the last moments, a second at most, in which the GPU ran anything: 0 to 1."""
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100
        except self._nvml.NVMLError as error:
            self._complain(error)
            return UNKNOWN

    def memory(self) -> GpuMemory:
        """Memory in use and free now."""
        try:
            info = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
            return GpuMemory(float(info.used), float(info.free))
        except self._nvml.NVMLError as error:
            self._complain(error)
            return GpuMemory(UNKNOWN, UNKNOWN)

    def _complain(self, error: Exception) -> None:
        with self._lock:
            if not self._complained:
                self._complained = True
                _log.warning("the GPU cannot be read; it is not said again", reason=str(error))
